"""A replica with continuous batching in this process, measured under load: without Ray and HTTP.

Owns: the load (as many sequences as may share a step, and a few that wait), units a second and the gaps
between a sequence's outputs. Must not know: what is searched for. The keys are put in force in place, on an
engine whose memory was made for the largest of them; a language model's prompts are made unequal, or the
prefix cache would have them all.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deployments.core.contract import RequestOptions
from deployments.core.errors import ServingError
from deployments.engine.pace import Pace
from deployments.engine.sequence import Sequence, Step
from deployments.engine.stream import StepSeconds
from deployments.runtime.continuous import ContinuousService
from deployments.runtime.device import choose_device
from deployments.runtime.fronts import Place, front_of, is_language_model
from deployments.runtime.memory import resident_bytes
from deployments.runtime.model_class import load_class
from scripts.tune.inputs import cost_of, dealt, items_of, reason_of
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape, Started

PATIENCE_MS = 600_000.0
WARM_S = 1.5
"""So long at most until every place is taken: prompts come first."""
LEAST_STEPS = 8
WAITING_SHARE = 4
"""For each four that run one more waits, so that a place that becomes free is taken in the next step."""


class Stepped:
    """One ContinuousService. All methods on one event loop; one look at a time."""

    def __init__(self, job: Job, shape: Shape, batch: int) -> None:
        self._job, self._threads = job, shape.threads
        model_class = load_class(job.model)
        self._is_language = is_language_model(model_class)
        limits = replace(
            job.limits, max_sequences=batch, max_streams=max(job.limits.max_streams, 2 * batch),
            max_queue_items=1_000_000, max_queue_s=PATIENCE_MS / 1e3, timeout_ms=PATIENCE_MS,
        )  # fmt: skip
        self._most = batch
        self._service = ContinuousService(
            job.name, front_of(model_class, job.model_args, shape.variant), limits
        )
        self._items: Iterator[Any] = iter(())
        self._number = itertools.count(1)

    async def start(self) -> Started:
        """Load, warm up, read the items. Raises what the model raises, CouldNotRun without items."""
        place = Place(choose_device(self._job.gpus), min(1.0, self._job.gpus) or 1.0)
        await self._service.start(place, self._threads)
        items = items_of(self._job.inputs, self._service.card)
        costs = [1.0]
        if not self._is_language:  # whose items may go on for minutes; what fails shows in the first look
            costs = [await cost_of(self._service, item, where) for where, item in items]
        self._items = dealt([item for _, item in items])
        card = self._service.card
        return Started(place.device, card.cost_unit, tuple(costs), resident_bytes(), None, self._is_language)

    async def close(self) -> None:
        await self._service.close()

    async def look(self, point: Point, seconds: float) -> Look:
        """Keep every place taken for `seconds`."""
        if point.batch > self._most:
            raise CouldNotRun(f"memory was made for {self._most} sequences, not for {point.batch}")
        self._apply(point)
        tape = _Tape(counts_outputs=self._is_language)
        self._service.loop.observer = tape
        in_flight = point.batch + -(-point.batch // WAITING_SHARE)
        clients = [asyncio.ensure_future(self._client(tape)) for _ in range(in_flight)]
        try:
            await self._until_full(tape, point)
            began = time.monotonic()
            tape.begin()
            await tape.wait(began + seconds, LEAST_STEPS)
            ended = time.monotonic()
            found = tape.look(ended - began)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        await tape.wait(0.0, tape.steps + (1 if self._service.loop.streams else 0))
        tape.check()
        return found

    async def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look:
        raise CouldNotRun("the latency of a continuous application is its gaps under full load, not a rate's")

    # -- inside ----------------------------------------------------------------------------------------

    def _apply(self, point: Point) -> None:
        scheduler = self._service.loop.engine.scheduler
        limits, cost = scheduler.limits, float(point.batch)
        lane_cost = limits.lane_cost if self._service.loop.chunks is not None else cost
        limits = replace(limits, step_cost=cost, lane_cost=lane_cost)
        if self._is_language and point.cost is not None:
            units = max(int(point.cost), point.batch + 1)
            if units != limits.step_units:
                scheduler.pace = Pace(units)
            limits = replace(limits, step_units=units, burst=int(point.cost))
        scheduler.limits = limits

    async def _client(self, tape: "_Tape") -> None:
        while True:
            try:
                outcome = (await self._service.predict([self._next()], RequestOptions())).outcomes[0]
                error = outcome.error
            except ServingError as refused:
                error = refused
            if error is not None:
                tape.fail(reason_of(error))
                return

    def _next(self) -> Any:
        item = next(self._items)
        return _unequal(item, next(self._number)) if self._is_language else item

    async def _until_full(self, tape: "_Tape", point: Point) -> None:
        deadline = time.monotonic() + WARM_S
        await tape.wait(0.0, 2)
        while time.monotonic() < deadline and tape.rows < 0.9 * point.batch:
            await tape.wait(0.0, tape.steps + 1)


def _unequal(item: Any, number: int) -> Any:
    """The same item with a number before its text."""
    if isinstance(item, str):
        return f"{number}. {item}"
    if isinstance(item, dict) and item.get("messages"):
        return {**item, "messages": _unequal(item["messages"], number)}
    if (
        isinstance(item, list)
        and item
        and isinstance(item[-1], dict)
        and isinstance(item[-1].get("content"), str)
    ):
        return [*item[:-1], {**item[-1], "content": f"{number}. {item[-1]['content']}"}]
    return item


class _Tape:
    """An observer that counts steps and units and keeps the gaps. counts_outputs: tokens, prompts apart."""

    def __init__(self, *, counts_outputs: bool) -> None:
        self._counts_outputs = counts_outputs
        self._change = asyncio.Event()
        self._error = ""
        self.steps = self.rows = 0
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.steps, self._units, self._in_steps = 0, 0, 0
        self._gaps_s: list[float] = []
        self._last_s: float | None = None

    def on_step(self, step: Step, seconds: StepSeconds) -> None:
        now = time.monotonic()
        self.steps += 1
        self.rows = len(step.work)
        self._in_steps += self.rows
        if not self._counts_outputs:
            self._units += self.rows
            if self._last_s is not None:
                self._gaps_s.append(now - self._last_s)
            self._last_s = now
        self._change.set()

    def on_outputs(self, sequence: Sequence, count: int, gap_s: float | None) -> None:
        if self._counts_outputs:
            self._units += count
            if gap_s is not None:
                self._gaps_s.append(gap_s)

    def fail(self, reason: str) -> None:
        self._error = self._error or reason
        self._change.set()

    def check(self) -> None:
        if self._error:
            raise CouldNotRun(f"an item fails under load: {self._error}")

    async def wait(self, until: float, steps: int) -> None:
        """Until the time has come and `steps` in all have run, or an item failed."""
        while not self._error and (self.steps < steps or time.monotonic() < until):
            self._change.clear()
            rest_s = until - time.monotonic()
            try:
                await asyncio.wait_for(self._change.wait(), rest_s if rest_s > 0.0 else None)
            except asyncio.TimeoutError:
                pass

    def look(self, seconds: float) -> Look:
        gaps = sorted(self._gaps_s)
        p99_s = gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else 0.0
        return Look(self._units / max(seconds, 1e-9), self._in_steps / max(1, self.steps), 1e3 * p99_s)
