"""A replica with dynamic batching in this process, measured under load: without Ray and HTTP.

Owns: the load (closed loop, or Poisson arrivals), and what is counted of it. Must not know: what is searched
for. Rates count a batch that an edge of the window cuts by the part that lies inside: with few long batches
in a window, whole ones would be wrong by a batch a slot.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deployments.audit.decision import Asked, decide
from deployments.core.batcher import BatchReport
from deployments.core.contract import RequestOptions
from deployments.core.errors import ServingError
from deployments.core.machine import usable_cpus
from deployments.core.submission import Batch
from deployments.runtime.adapter import Adapter
from deployments.runtime.device import choose_device
from deployments.runtime.memory import resident_bytes
from deployments.runtime.model_class import load_class
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing
from scripts.tune.inputs import cost_of, dealt, items_of, reason_of
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape, Started

PATIENCE_S = 600.0
"""Nobody is refused while capacity is measured: nothing is to be learned from a refusal."""
FULL_S = 0.5
"""So long at most until batches are full: with preprocessing off the loop the first ones are not."""
GROWTH_S = 30.0
IDLE_POLL_S = 0.005
LEAST_REQUESTS = 30
LOST_SHARE = 0.02
"""Of all that will come; with so many late already, no p99 can be right any more."""


class Batched:
    """One ModelService. All methods on one event loop; one look at a time."""

    def __init__(self, job: Job, shape: Shape, batch: int) -> None:
        self._job, self._shape = job, shape
        self._service = make_service(job, shape, batch)
        self._items: Iterator[Any] = iter(())
        self._warm: set[tuple[int, float | None]] = set()

    async def start(self) -> Started:
        """Load, warm up, read the items. Raises what the model raises, CouldNotRun without items."""
        device = choose_device(self._job.gpus)
        await self._service.start(
            device,
            self._shape.threads * self._shape.slots,
            decide=lambda first: sharing_of(self._job, self._shape),
        )
        items = items_of(self._job.inputs, self._service.card)
        costs = [await cost_of(self._service, item, where) for where, item in items]
        self._items = dealt([item for _, item in items])
        await self._grow()
        card = self._service.card
        return Started(
            device, card.cost_unit, tuple(costs), resident_bytes(), self._service.limits.max_batch_cost
        )

    async def close(self) -> None:
        self._service.drain()
        self._service.close()

    async def look(self, point: Point, seconds: float) -> Look:
        """Saturate it for `seconds` after batches have become full."""
        self._apply(point)
        tape = _Tape()
        self._service.batcher.observer = tape
        in_flight = 2 * self._shape.slots * point.batch + self._shape.slots
        clients = [asyncio.ensure_future(self._client(tape)) for _ in range(in_flight)]
        try:
            await self._until_full(tape, point)
            began, used_s = time.monotonic(), time.process_time()
            await tape.wait(began + seconds, ends=tape.ended + 2 * self._shape.slots)
            ended, used_s = time.monotonic(), time.process_time() - used_s
        finally:
            tape.is_over = True
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        await self._until_idle()
        tape.check()
        return replace(tape.look(began, ended), busy=used_s / (ended - began) / usable_cpus())

    async def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look:
        """Poisson arrivals at `rate` a second, whatever becomes of them; latency from the intended time.

        Ends early where more than a hundredth of all that will come is late already.
        """
        self._apply(point)
        tape = _Tape()
        self._service.batcher.observer = tape
        source = random.Random(17)
        count = max(LEAST_REQUESTS, round(rate * seconds))
        loop = asyncio.get_running_loop()
        asks: list[asyncio.Future[None]] = []
        at = began = loop.time()
        try:
            for _ in range(count):
                at += source.expovariate(rate)
                if (delay_s := at - loop.time()) > 0:
                    await asyncio.sleep(delay_s)
                asks.append(asyncio.ensure_future(self._ask(tape, at, late_ms)))
                if tape.late > max(1.0, LOST_SHARE * count):
                    break
            else:
                await asyncio.wait(asks, timeout=2.0 * late_ms / 1e3)
        finally:
            unanswered = sum(not ask.done() for ask in asks)
            for ask in asks:
                ask.cancel()
            await asyncio.gather(*asks, return_exceptions=True)
        await self._until_idle()
        tape.check()
        latencies_ms = sorted([*tape.latencies_ms, *[10.0 * late_ms] * unanswered])
        whole = tape.look(began, max(at, loop.time()))
        return replace(
            whole,
            rate=rate,
            p99_ms=latencies_ms[int(0.99 * len(latencies_ms))],
            # What was not sent any more would have been late too.
            late_share=(tape.late + unanswered) / count if len(asks) == count else 1.0,
        )

    # -- inside ----------------------------------------------------------------------------------------

    async def _grow(self) -> None:
        """A pool begins with one instance and makes more when work waits for them."""
        wanted, admission = self._shape.slots, self._service.batcher.scheduler.admission
        deadline = time.monotonic() + GROWTH_S
        while admission.slots < wanted:
            if time.monotonic() > deadline:
                raise CouldNotRun(f"its pool stays at {admission.slots} of {wanted} slots (memory?)")
            await asyncio.gather(*(self._answered(_Tape()) for _ in range(4 * wanted)))

    def _apply(self, point: Point) -> None:
        self._service.change_limits(
            replace(self._service.limits, max_batch_size=point.batch, max_batch_cost=point.cost)
        )

    async def _client(self, tape: "_Tape") -> None:
        """Not ended by cancelling alone: before Python 3.12 wait_for drops that where an answer just came."""
        while not tape.is_over and await self._answered(tape):
            pass

    async def _ask(self, tape: "_Tape", due: float, late_ms: float) -> None:
        await self._answered(tape)
        took_ms = 1e3 * (asyncio.get_running_loop().time() - due)
        tape.latencies_ms.append(took_ms)
        tape.late += took_ms > late_ms

    async def _answered(self, tape: "_Tape") -> bool:
        try:
            answer = await self._service.predict([next(self._items)], OPTIONS)
            error = answer.outcomes[0].error
        except ServingError as refused:
            error = refused
        if error is not None:
            tape.fail(reason_of(error))
        return error is None

    async def _until_full(self, tape: "_Tape", point: Point) -> None:
        """The first batches are of the first to arrive; of a new size they also allocate and pack."""
        slots, key = self._shape.slots, (point.batch, point.cost)
        await tape.wait(0.0, ends=slots if key in self._warm else 2 * slots)
        if self._service.card.media_types:
            await tape.wait(time.monotonic() + FULL_S, ends=0)
        self._warm.add(key)

    async def _until_idle(self) -> None:
        """Asked again and again: the tape waits for no batch any more once an item has failed."""
        while self._service.batcher.scheduler.running:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)


def make_service(job: Job, shape: Shape, batch: int) -> ModelService:
    """The replica's own service as its shell makes it, with nobody refused."""
    limits = replace(
        job.limits,
        slots=shape.slots,
        max_batch_size=batch,
        max_queue_items=1_000_000,
        max_queue_cost=None,
        max_queue_s=PATIENCE_S,
        timeout_ms=1e3 * PATIENCE_S,
    )
    return ModelService(
        job.name, lambda: Adapter(load_class(job.model), job.model_args, shape.variant), limits
    )


async def sharing_of(job: Job, shape: Shape) -> Sharing:
    """As a replica decides it, of so many slots. Batches are formed as told: the caller knows the verdict."""
    asked = Asked(job.safety, shape.slots, allow_batch_dependence=True)
    return decide(asked, job.report).sharing


OPTIONS = RequestOptions()


class _Tape:
    """An observer that keeps when batches ran; `wait` sleeps until enough of them have ended."""

    def __init__(self) -> None:
        self._runs: list[tuple[float, float, int]] = []  # began, ended, items
        self._ends = asyncio.Event()
        self._error = ""
        self._ran_out = False
        self.is_over = False
        self.latencies_ms: list[float] = []
        self.late = 0

    @property
    def ended(self) -> int:
        return len(self._runs)

    def on_batch(self, batch: Batch, report: BatchReport, queue_waits_s: Sequence[float]) -> None:
        # Answers are handed out before this is called: the batch's own time is what its slot was taken.
        self._runs.append((batch.started, batch.started + report.model_s, len(batch.items)))
        self._ran_out |= bool(report.out_of_memory)
        self._ends.set()

    def fail(self, reason: str) -> None:
        self._error = self._error or reason
        self._ends.set()

    def check(self) -> None:
        """Raise CouldNotRun where an item failed."""
        if self._error:
            raise CouldNotRun(f"an item fails under load: {self._error}")

    async def wait(self, until: float, ends: int) -> None:
        """Until the time has come and `ends` batches in all have ended, or an item failed."""
        while not self._error and (len(self._runs) < ends or time.monotonic() < until):
            self._ends.clear()
            rest_s = until - time.monotonic()
            try:
                await asyncio.wait_for(self._ends.wait(), rest_s if rest_s > 0.0 else None)
            except asyncio.TimeoutError:
                pass

    def look(self, began: float, ended: float) -> Look:
        parts = [
            (items * max(0.0, min(e, ended) - max(b, began)) / max(e - b, 1e-9), items)
            for b, e, items in self._runs
            if e > began and b < ended
        ]
        done = sum(part for part, _ in parts)
        sizes = [items for _, items in parts]
        return Look(
            rate=done / max(ended - began, 1e-9),
            size=sum(sizes) / max(1, len(sizes)),
            ran_out=self._ran_out,
        )
