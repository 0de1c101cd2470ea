"""The engine's asyncio side: a loop that plans, runs and commits, and one stream for each sequence.

Owns: when the engine is asked (never while a step runs), how outputs reach their readers, back-pressure
both ways. Must not know: what a sequence computes, HTTP. The runner is called through `call`, which
brings it to the model thread; while it runs, readers of the step before get their outputs.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Values
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deployments.core.errors import InternalError, ModelFailed, ServingError
from deployments.engine.engine import Engine
from deployments.engine.sequence import Advance, Runner, Sequence, State, Step

logger = logging.getLogger(__name__)

MAX_UNREAD_OUTPUTS = 256
"""A stream whose reader is this far behind sits out until it has read them. 8 s of voice activity; a
few kB. Language models are not held: their outputs are bounded by max_tokens, and a slot that waits
for a slow reader is lost to everybody else."""
MAX_WAITING_UNITS = 128
"""`feed` waits while this many chunks are not computed: what a stream may send ahead, 4 s of audio."""

FEED_BYTES = 32 * 1024
"""How a whole recording is fed: 1 s of 16-bit audio at 16 kHz, so that others' chunks come between."""

CLOSE_S = 2.0
"""How long `close` waits for the step that runs, and for the runner to hear who left."""

Call = Callable[[Callable[[], list[Advance]]], Awaitable[list[Advance]]]


class Chunks(Protocol):
    """How bytes become units of work; the step-wise model's."""

    def split(self, sequence: Sequence, data: bytes) -> int:
        """Take bytes in; how many chunks that made. Raises ServingError."""
        ...

    def finish_input(self, sequence: Sequence) -> int: ...


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Where a step's time went. schedule: plan and commit; run: on the model thread, with the way there
    and back; send: handing outputs to their streams."""

    schedule: float
    run: float
    send: float


class Observer(Protocol):
    """Told about steps and outputs as they happen; cheap, never raising."""

    def on_step(self, step: Step, seconds: StepSeconds) -> None: ...

    def on_outputs(self, sequence: Sequence, count: int, gap_s: float | None) -> None:
        """gap_s: since its last outputs; None: these are its first."""
        ...


class EngineLoop:
    """Drives one engine; make it, then `start` it on the event loop that owns it."""

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        *,
        call: Call,
        clock: Callable[[], float],
        observer: Observer,
        chunks: Chunks | None = None,
        holds: bool = True,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.observer = observer
        self.chunks = chunks
        self.holds = holds
        self.streams: dict[Sequence, Stream] = {}
        self._runner = runner
        self._call = call
        self._wake = asyncio.Event()
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def wake(self) -> None:
        """Something entered, left or changed: plan anew if idle."""
        self._wake.set()

    def open(self, sequences: Values[Sequence]) -> "list[Stream]":
        """Queue all or none; raises what Engine.submit raises."""
        self.engine.submit(sequences, self.clock())
        streams = [Stream(self, sequence) for sequence in sequences]
        self.streams.update(zip(sequences, streams, strict=True))
        self.wake()
        return streams

    def end_all(self, error: ServingError) -> None:
        """End every stream with `error`: the server stops, or the runner is gone."""
        for stream in list(self.streams.values()):
            stream.fail(error)

    async def close(self) -> None:
        """Take no more, and stop once the runner has heard of all that left; call after `end_all`."""
        self.engine.is_draining = self._is_closing = True
        self.wake()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_S)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                began = self.clock()
                step = self.engine.plan(began)
                self._tell_ended()
                if step is not None:
                    await self._step(step, self.clock() - began)
                elif self._is_closing:
                    return
                else:
                    await self._idle()
        except asyncio.CancelledError:
            raise
        except BaseException:
            logger.exception("event=engine_loop_failed")
            self.engine.is_draining = True  # nobody would plan for who comes now
            self.end_all(InternalError("the engine failed; the log has the reason"))
            raise

    async def _idle(self) -> None:
        deadline = self.engine.next_deadline()
        timeout_s = None if deadline is None else max(0.0, deadline - self.clock())
        try:
            await asyncio.wait_for(self._wake.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass

    async def _step(self, step: Step, planned_s: float) -> None:
        started = self.clock()
        try:
            advances = await self._call(partial(self._runner.run, step))
        except Exception as bug:
            logger.exception("event=step_failed sequences=%d", len(step.work))
            self.engine.fail(step, ModelFailed.of("the model raised in a step", bug), self.clock())
            return
        ran = self.clock()
        self.engine.commit(step, advances, ran)
        committed = self.clock()
        self._deliver(step, advances, ran)
        seconds = StepSeconds(planned_s + committed - ran, ran - started, self.clock() - committed)
        self.observer.on_step(step, seconds)

    def _deliver(self, step: Step, advances: Values[Advance], now: float) -> None:
        for work, advance in zip(step.work, advances, strict=True):
            stream = self.streams.get(work.sequence)
            if stream is None:  # its reader left meanwhile
                continue
            if advance.outputs:
                stream.deliver(advance.outputs, now)
            stream.on_progress()

    def _tell_ended(self) -> None:
        for sequence in self.engine.take_ended():
            stream = self.streams.pop(sequence, None)
            if stream is not None:
                stream.finish(sequence.error)


class Stream:
    """One sequence's OutputStream (core/contract.py)."""

    def __init__(self, loop: EngineLoop, sequence: Sequence) -> None:
        self.sequence = sequence
        self._loop = loop
        self._outputs: deque[Any] = deque()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._is_over = False
        self._error: ServingError | None = None
        self._late_error: ServingError | None = None  # of its input's end: after what was fed
        self._last: float | None = None

    # -- the engine's side ------------------------------------------------------------------------------

    def deliver(self, outputs: Values[Any], now: float) -> None:
        self._outputs.extend(outputs)
        self._readable.set()
        self._loop.observer.on_outputs(
            self.sequence, len(outputs), None if self._last is None else now - self._last
        )
        self._last = now
        if self._loop.holds and len(self._outputs) >= MAX_UNREAD_OUTPUTS:
            self._loop.engine.hold(self.sequence, True)

    def on_progress(self) -> None:
        if self.sequence.remaining < MAX_WAITING_UNITS:
            self._writable.set()

    def finish(self, error: ServingError | None) -> None:
        self._is_over = True
        self._error = error or self._late_error
        self._readable.set()
        self._writable.set()

    def fail(self, error: ServingError) -> None:
        """End it from outside the engine; what was not read yet still is."""
        self._loop.engine.cancel(self.sequence)
        self._loop.streams.pop(self.sequence, None)
        self._loop.wake()
        if not self._is_over:
            self.finish(error)

    # -- the reader's side ------------------------------------------------------------------------------

    async def read(self) -> list[Any]:
        while not self._outputs:
            if self._is_over:
                if self._error is not None:
                    raise self._error
                return []
            self._readable.clear()
            await self._readable.wait()
        outputs = list(self._outputs)
        self._outputs.clear()
        if self.sequence.is_held:
            self._loop.engine.hold(self.sequence, False)
            self._loop.wake()
        return outputs

    async def feed(self, data: bytes) -> None:
        chunks = self._loop.chunks
        assert chunks is not None, "only for models with chunk()"
        self._check_open()
        if self.sequence.state is State.ENDED:  # the model is done, or the reader left: nobody wants it
            return
        try:
            units = chunks.split(self.sequence, data)
        except ServingError as error:
            self.fail(error)
            raise
        if units:
            self._loop.engine.feed(self.sequence, units)
            self._loop.wake()
        while self.sequence.remaining >= MAX_WAITING_UNITS and not self._is_over:
            self._writable.clear()
            await self._writable.wait()
        self._check_open()

    async def feed_all(self, data: bytes) -> None:
        """All of the input at once, and its end. Raises nothing: the reader is told."""
        try:
            for start in range(0, len(data), FEED_BYTES):
                await self.feed(data[start : start + FEED_BYTES])
            self.end_input()
        except ServingError:
            pass
        except Exception as bug:
            self.fail(InternalError.of("the input could not be cut into chunks", bug))

    def _check_open(self) -> None:
        if self._is_over and self._error is not None:
            raise self._error

    def end_input(self) -> None:
        chunks = self._loop.chunks
        assert chunks is not None, "only for models with chunk()"
        if self.sequence.state is State.ENDED or not self.sequence.is_open:
            return
        units = 0
        try:
            units = chunks.finish_input(self.sequence)
        except ServingError as error:
            self._late_error = error
        self._loop.engine.feed(self.sequence, units)
        self._loop.engine.end_input(self.sequence)
        self._loop.wake()

    def close(self) -> None:
        self._loop.engine.cancel(self.sequence)
        self._loop.streams.pop(self.sequence, None)
        self._is_over = True
        self._outputs.clear()
        self._readable.set()
        self._writable.set()
        self._loop.wake()
