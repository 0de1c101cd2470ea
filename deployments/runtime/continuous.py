"""A replica with continuous batching, without Ray: requests in, streams of outputs out.

Owns: start (load, warm-up, the largest useful batch), the bounds of streams, collecting a stream's
outputs for /predict, draining. Implements core's TextService. Must not know: Ray, HTTP, who runs when.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from deployments.core.contract import Answer, Generation, Limits, ModelCard, Outcome, RequestOptions
from deployments.core.errors import Draining, InternalError, Overloaded, RequestTooLarge, ServingError
from deployments.core.generation import GenerationRequest
from deployments.core.machine import usable_cpus
from deployments.engine.engine import Engine
from deployments.engine.figures import EngineFigures, EngineSink, NoEngineSink
from deployments.engine.sequence import Sequence as EngineSequence
from deployments.engine.stream import EngineLoop, Stream
from deployments.runtime.device import set_threads
from deployments.runtime.fronts import Front, Place
from deployments.runtime.model_thread import ModelThread
from deployments.runtime.slots import Sharing
from deployments.runtime.step_curve import warm_up

T = TypeVar("T")
logger = logging.getLogger(__name__)

Decide = Callable[[Any], Awaitable[Sharing]]

GAUGE_EVERY_S = 1.0
HANG_AFTER_S = 120.0
"""A step that runs this long is a hung model: check_health fails and Ray replaces the replica."""
CLOSE_S = 5.0
"""How long `close` waits for the step that runs."""
INLINE_BODY_BYTES = 16 * 1024
"""Requests up to this size are read on the event loop: encoding 16 kB of text takes about 5 ms."""
INLINE_OUTPUTS = 1_000
"""So many outputs are put together on the event loop; vad's of an hour are 112,500."""


class ContinuousService:
    """One replica's model behind its engine; all methods on one event loop."""

    def __init__(
        self,
        app_name: str,
        front: Front,
        limits: Limits,
        *,
        replica: str = "",
        sink: EngineSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app_name, self._front, self._limits = app_name, front, limits
        self._replica, self._clock = replica, clock
        self._sink = sink or NoEngineSink()
        self._thread = ModelThread("model")
        self._pool = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="prepare")
        self._card: ModelCard | None = None
        self._loop: EngineLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._device = "cpu"
        self._is_warm = False
        self.sharing = Sharing()
        self.figures = EngineFigures(self._sink, clock, front.sample_s)

    # -- start and stop -----------------------------------------------------------------------------

    async def start(self, place: Place, threads: int | None = None, *, decide: Decide | None = None) -> None:
        """Load and warm up; raises what the model raises. Ready when it returns. threads: torch's.

        decide: how the model may be used, asked when it is loaded and has not been called.
        """
        self._device = place.device
        engine, runner = await self._thread.call(lambda: self._load(place, threads))
        if decide is not None:
            self.sharing = await decide(self._front.instance)
        engine.max_queue_s = _queue_bound_s(self._limits)
        self._card = self._front.card(self._app_name)
        self._loop = EngineLoop(
            engine,
            runner,
            call=self._thread.call,
            clock=self._clock,
            observer=self.figures,
            chunks=self._front.chunks,
            holds=self._front.holds,
        )
        self._loop.start()
        await warm_up(self._loop, self._front, app_name=self._app_name)
        self.figures = EngineFigures(self._sink, self._clock, self._front.sample_s)
        self._loop.observer = self.figures
        engine.forget()
        self._is_warm = True
        self._tasks.append(asyncio.ensure_future(self._push_gauges()))

    def _load(self, place: Place, threads: int | None) -> tuple[Engine, Any]:
        set_threads(threads or usable_cpus())
        return self._front.load(place, self._limits)

    def drain(self, grace_s: float | None = None) -> None:
        """New work gets Draining from now on; what still streams after `grace_s` ends with an error."""
        self.loop.engine.is_draining = True
        if grace_s is not None:
            self._tasks.append(asyncio.ensure_future(self._cut_after(grace_s)))

    async def _cut_after(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        self.loop.end_all(
            Draining("this server is stopping; open the stream again elsewhere", retry_after_s=1)
        )

    async def close(self) -> None:
        """End the tasks and the model thread; open streams end with an error."""
        for task in self._tasks:
            task.cancel()
        if self._loop is not None:
            self._loop.end_all(Draining("this server is stopping", retry_after_s=1))
            await self._loop.close()
        self._thread.close()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, CLOSE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def change_limits(self, limits: Limits) -> None:
        """Put new limits in force for what comes next; what memory was made for can't change in place."""
        self._limits = limits
        engine = self.loop.engine
        engine.max_queue_s = _queue_bound_s(limits)
        engine.scheduler.limits = replace(engine.scheduler.limits, max_waiting=limits.max_queue_items)

    def check_health(self) -> None:
        """Raise RuntimeError when the model thread or the engine is gone or hangs; runs nothing."""
        if not self._thread.is_alive:
            raise RuntimeError("the model thread has ended")
        if self._loop is not None and not self._loop.is_alive:
            raise RuntimeError("the engine has ended")
        if self._front.has_lost_device:
            raise RuntimeError("the device failed and stays failed in this process")
        if self._loop is not None and self._thread.busy_for_s() > HANG_AFTER_S:
            raise RuntimeError(f"a step has been running for {self._thread.busy_for_s():.0f} s")

    async def _push_gauges(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_EVERY_S)
            try:
                self.figures.send(self.loop.engine, len(self.loop.streams))
            except Exception:  # the loop's outermost edge
                logger.exception("metrics_failed app=%s", self._app_name)

    # -- Service --------------------------------------------------------------------------------------

    @property
    def loop(self) -> EngineLoop:
        assert self._loop is not None, "start() first"
        return self._loop

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "start() first"
        return self._card

    @property
    def limits(self) -> Limits:
        return self._limits

    def is_ready(self) -> bool:
        return self._is_warm and not self.loop.engine.is_draining

    def count_outcome(self, status: int, *, route: str) -> None:
        self.figures.count_request(status, route)

    def check_room(self, items: int) -> None:
        self._check_room(items, RequestOptions())

    def _check_room(self, items: int, options: RequestOptions) -> None:
        self._check_streams(items)
        self.loop.engine.check_room(self._clock(), items, timeout_s=self._timeout_s(options))

    def _timeout_s(self, options: RequestOptions) -> float:
        """Until when the caller wants its sequences begun."""
        return (self._limits.timeout_ms if options.timeout_ms is None else options.timeout_ms) / 1e3

    def _check_streams(self, more: int) -> None:
        most = self._limits.max_streams
        if more > most:
            raise RequestTooLarge(
                f"{more} sequences in one request, at most {most} may be open (max_streams)"
            )
        if len(self.loop.streams) + more > most:
            self.loop.engine.counters.refused += more
            raise Overloaded(
                f"{len(self.loop.streams)} streams are open, at most {most} may be (max_streams)",
                retry_after_s=1,
            )

    # -- streams ------------------------------------------------------------------------------------

    def open_stream(self, item: Any, options: RequestOptions) -> Stream:
        """See core.contract.StreamingService."""
        request = None if self._front.chunks is not None else self._front.read_item(item)
        return self._open(self._front.prepare(request), options)[0]

    async def generate(
        self, requests: Sequence[GenerationRequest], options: RequestOptions
    ) -> list[Generation]:
        """See core.contract.TextService."""
        arrived = self._clock()
        self._check_room(sum(request.n for request in requests), options)
        has_grammar = any(request.grammar is not None for request in requests)  # up to 1 s to compile
        is_short = options.body_bytes <= INLINE_BODY_BYTES and not has_grammar
        prepared = await self._call(lambda: [self._front.prepare(one) for one in requests], is_short)
        prompts = [sequences[0].known for sequences in prepared]
        streams = iter(self._open([one for sequences in prepared for one in sequences], options, arrived))
        return [
            Generation([next(streams) for _ in sequences], prompt_tokens)
            for sequences, prompt_tokens in zip(prepared, prompts, strict=True)
        ]

    def _open(
        self, sequences: Sequence[EngineSequence], options: RequestOptions, arrived: float | None = None
    ) -> list[Stream]:
        self._check_streams(len(sequences))
        arrived = self._clock() if arrived is None else arrived
        timeout_s = self._timeout_s(options)
        for sequence in sequences:
            sequence.arrived = arrived
            sequence.deadline = arrived + timeout_s
            sequence.priority = options.priority
        return self.loop.open(sequences)

    async def _call(self, work: Callable[[], T], is_short: bool) -> T:
        """Off the event loop where it may take long."""
        if is_short:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    # -- /predict -----------------------------------------------------------------------------------

    async def predict(self, items: Sequence[Any], options: RequestOptions) -> Answer:
        """See core.contract.Service: each item is a sequence of its own, read to its end."""
        arrived = self._clock()
        self._check_room(len(items), options)
        is_short = options.body_bytes <= INLINE_BODY_BYTES
        prepared = await self._call(lambda: [self._prepare(item) for item in items], is_short)
        sequences = [p[0] for p in prepared if not isinstance(p, ServingError)]
        streams = self._open(sequences, options, arrived) if sequences else []
        rest = iter(streams)
        jobs = [
            _failed(p) if isinstance(p, ServingError) else self._collect(next(rest), p[1], options)
            for p in prepared
        ]
        try:
            outcomes = await asyncio.gather(*jobs)
        finally:  # a job that is cancelled before its first step never comes to its own `finally`
            for stream in streams:
                stream.close()
        began = [sequence.began for sequence in sequences if sequence.began is not None]
        now = self._clock()
        return Answer(
            list(outcomes),
            queue_ms=1e3 * (max(began, default=arrived) - arrived),
            batch_size=len(sequences),
            model_ms=1e3 * (now - min(began, default=now)),
        )

    def _prepare(self, item: Any) -> tuple[EngineSequence, bytes | None] | ServingError:
        """(its sequence, the bytes to feed it), or why not."""
        try:
            request = self._front.read_item(item)
            has_chunks = self._front.chunks is not None
            sequence = self._front.prepare(None if has_chunks else request)[0]
            self.loop.engine.check_fits(sequence)
            return sequence, request if has_chunks else None
        except ServingError as error:
            return error
        except Exception as bug:
            return InternalError.of("this item could not be prepared", bug)

    async def _collect(self, stream: Stream, data: bytes | None, options: RequestOptions) -> Outcome:
        feeding = None if data is None else asyncio.ensure_future(stream.feed_all(data))
        outputs: list[Any] = []
        try:
            while part := await stream.read():
                outputs += part
            answer = partial(self._front.answer, stream.sequence, outputs, as_tensors=options.as_tensors)
            value = await self._call(answer, len(outputs) <= INLINE_OUTPUTS)
            return Outcome(value, cost=float(stream.sequence.known))
        except ServingError as error:
            return Outcome(error=error)
        except Exception as bug:
            return Outcome(error=InternalError.of("the outputs could not be put together", bug))
        finally:
            if feeding is not None:
                feeding.cancel()

    # -- figures ------------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, Any]:
        """This replica's figures; schema in docs/reference/stats.md."""
        engine, figures = self.loop.engine, self.figures
        counters, pool = engine.counters, engine.scheduler.pool
        seconds = figures.step_s
        return {
            "application": self._app_name,
            "replica": self._replica,
            "state": "draining" if engine.is_draining else "ready",
            "device": self._device,
            "uptime_s": round(self._clock() - figures.started, 3),
            "in_flight": len(self.loop.streams),
            "safety": self.sharing.stats(),
            "tasks": len(asyncio.all_tasks()),
            "engine": {
                "running": engine.running,
                "waiting": engine.waiting,
                "streams": len(self.loop.streams),
                "blocks_total": pool.total if pool else 0,
                "blocks_used": pool.used if pool else 0,
                "blocks_cached": pool.cached if pool else 0,
                "block_units": pool.units if pool else 0,
                "steps": counters.steps,
                "units": counters.units,
                "prompt_units": counters.prompt_units,
                "cached_units": counters.cached_units,
                "preemptions": engine.scheduler.preemptions,
                "predicted_wait_ms": round(1e3 * engine.predicted_wait_s(), 3),
                "step_s": {
                    "schedule": round(seconds.schedule, 6),
                    "run": round(seconds.run, 6),
                    "sample": round(seconds.sample, 6),
                    "send": round(seconds.send, 6),
                },
            },
            "totals": {
                "begun": counters.begun,
                "finished": counters.finished,
                "failed": counters.failed,
                "cancelled": counters.cancelled,
                "expired": counters.expired,
                "refused": counters.refused,
                "requests": {str(status): count for status, count in sorted(figures.statuses.items())},
            },
            "recent": figures.recent_json(),
            "limits": {
                "max_sequences": self._limits.max_sequences,
                "sequences_in_step": engine.limits.step_cost,
                "max_tokens_in_step": self._limits.max_tokens_in_step,
                "max_streams": self._limits.max_streams,
                "max_queue_items": self._limits.max_queue_items,
                "context_tokens": self.card.context_tokens,
            },
        }


async def _failed(error: ServingError) -> Outcome:
    return Outcome(error=error)


def _queue_bound_s(limits: Limits) -> float:
    """The longest predicted wait that is let in; without a bound there is none but the deadline."""
    return limits.max_queue_s or float("inf")
