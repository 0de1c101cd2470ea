"""Warm-up of an engine, and what it teaches: how long a step takes by how many share it.

Owns: the curve and the largest useful batch read off it. Must not know: HTTP, Ray, what a step computes.
A larger batch that takes as much longer as it is larger only makes everybody wait: a sequence is better
begun later and stepped faster (the finding of vllm-omni's PR 3860, for diffusion). Streams of chunks have all
begun: nobody waits for a place, and only a rate that falls is a reason for smaller steps.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deployments.engine.sequence import Sequence, Step
from deployments.engine.stream import EngineLoop, StepSeconds, Stream
from deployments.runtime.fronts import Front

logger = logging.getLogger(__name__)

USEFUL = 0.9
"""The smallest batch with this share of the best rate of sequences per second is the largest useful one."""
STEPS = 4
TIMEOUT_S = 300.0


class _Clocked:
    """An observer that keeps how long steps took, by how many sequences shared them."""

    def __init__(self) -> None:
        self.step_s: dict[int, list[float]] = defaultdict(list)

    def on_step(self, step: Step, seconds: StepSeconds) -> None:
        if step.work and step.units == len(step.work):
            self.step_s[len(step.work)].append(seconds.run)

    def on_outputs(self, sequence: Sequence, count: int, gap_s: float | None) -> None:
        pass


def useful_batch(curve: Mapping[int, float], *, is_begun: bool = False) -> int:
    """Of {sequences: seconds of a step} the smallest size within USEFUL of the best rate; the largest where
    the sequences have all begun."""
    rates = {size: size / max(seconds, 1e-9) for size, seconds in curve.items()}
    good = [size for size, rate in rates.items() if rate >= USEFUL * max(rates.values())]
    return max(good) if is_begun else min(good)


async def warm_up(loop: EngineLoop, front: Front, *, app_name: str) -> None:
    """Run the front's examples alone and together; bound the step by the largest useful batch.

    Raises what the examples raise. Language models keep their slots: their step's time hardly grows
    with its rows, and the engine's pace learns from these steps.
    """
    requests = front.warm_up()
    if not requests:
        logger.info("event=no_warm_up app=%s reason=%s", app_name, "the model has no examples()")
        return
    clocked = _Clocked()
    loop.observer = clocked
    cost = front.prepare(None if front.chunks is not None else requests[0])[0].cost
    most = max(1, int(loop.engine.limits.step_cost / cost))
    sizes = sorted({min(most, 2**power) for power in range(12) if 2**power < 2 * most})
    await _together(loop, front, requests[0], 1)  # first runs (allocations, packing) teach nothing
    clocked.step_s.clear()
    for size in sizes:
        await _together(loop, front, requests[0], size)
    curve = {size: min(seconds) for size, seconds in clocked.step_s.items() if size in sizes}
    logger.info("event=step_curve app=%s ms=%s", app_name, {n: round(1e3 * s, 2) for n, s in curve.items()})
    if loop.engine.scheduler.pool is None and curve:
        _bound_step(loop, cost * useful_batch(curve, is_begun=front.chunks is not None))


def _bound_step(loop: EngineLoop, cost: float) -> None:
    scheduler = loop.engine.scheduler
    lane_cost = scheduler.limits.lane_cost if loop.chunks is not None else cost
    scheduler.limits = replace(scheduler.limits, step_cost=cost, lane_cost=lane_cost)


async def _together(loop: EngineLoop, front: Front, request: Any, size: int) -> None:
    """`size` equal sequences for a few steps."""
    own = None if front.chunks is not None else request
    streams = loop.open([front.prepare(own)[0] for _ in range(size)])
    try:
        await asyncio.wait_for(asyncio.gather(*(_follow(s, front, request) for s in streams)), TIMEOUT_S)
    finally:
        for stream in streams:
            stream.close()


async def _follow(stream: Stream, front: Front, request: Any) -> None:
    feeding = None if front.chunks is None else asyncio.ensure_future(stream.feed_all(request))
    try:
        while stream.sequence.computed < stream.sequence.prompt + STEPS and await stream.read():
            pass
    finally:
        if feeding is not None:
            feeding.cancel()
