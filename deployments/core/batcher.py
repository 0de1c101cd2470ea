"""The batcher's asyncio side: it turns submissions into batches and slots into work.

Owns: slots, timers, futures. Every decision is the Scheduler's. Must not know: Ray, torch, what an
example is. One event loop; nothing here is thread-safe.
"""

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.core.errors import InternalError
from deployments.core.isolate import Span
from deployments.core.scheduler import Scheduler
from deployments.core.submission import Batch, Example, Result, Submission

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BatchReport:
    """What the executor tells of a finished batch: one result an item, in order.

    model_s: time in the model. runs: model calls (more than 1: the batch was split). out_of_memory, fitted:
    parts of the batch, as (first, end), that ran out of memory and, where any did, that went through.
    too_big: items that ran out alone. padding_share: share of the model's input that was padding, 0 to 1.
    """

    results: Sequence[Result]
    model_s: float = 0.0
    runs: int = 1
    out_of_memory: Sequence[Span] = ()
    fitted: Sequence[Span] = ()
    too_big: Sequence[int] = ()
    padding_share: float = 0.0


class Executor(Protocol):
    """Runs batches on the model; at most `slots` at once."""

    async def execute(
        self,
        batch: Batch,
        on_model_begins: Callable[[], None],
        on_model_done: Callable[[BatchReport], None],
    ) -> BatchReport:
        """Run `batch`. Call `on_model_begins` when it has reached the model and `on_model_done` at
        the moment the model is free, before handing out results. Must not raise; if it does, every
        item of the batch fails with an InternalError."""
        ...

    def stage_lead_s(self) -> float:
        """How long before a slot is free its next batch should be staged; 0: never (CPU)."""
        ...

    async def stage(self, batch: Batch) -> None:
        """Collate and copy `batch` ahead of its run."""
        ...

    def unstage(self, batch: Batch) -> None:
        """Forget what was staged for `batch`: somebody left it."""
        ...

    def on_backlog(self) -> None:
        """Work waits while every slot is busy: a pool that may grow does."""
        ...


class BatchObserver(Protocol):
    """Told of each finished batch; metrics listen here."""

    def on_batch(self, batch: Batch, report: BatchReport, queue_waits_s: Sequence[float]) -> None: ...


class Batcher:
    """Queue in, batches out.

    clock: monotonic seconds, the same as the loop's timers use.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self.observer: BatchObserver | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at = float("inf")
        self._staged: Batch | None = None
        self._in_transit = 0
        self._arrived = asyncio.Event()

    def check_room(self, items: int, *, timeout_s: float) -> None:
        """Raise what `reserve` would, and reserve nothing."""
        self.scheduler.check_room(self._clock(), items, timeout_s=timeout_s)

    def reserve(self, items: int, *, timeout_s: float, priority: int = 0) -> None:
        """Refuse before any work is spent on the items; see Scheduler.reserve."""
        self.scheduler.reserve(self._clock(), items, timeout_s=timeout_s, priority=priority)

    async def submit(
        self,
        examples: Sequence[Example],
        *,
        timeout_s: float,
        priority: int = 0,
        arrived: float | None = None,
        reserved: int = 0,
    ) -> Submission:
        """Queue the examples of one request and wait until each has its result.

        Raises what Scheduler.submit raises (then nothing was queued). Cancelling takes the waiting
        items out of the queue at once and drops the results of running ones.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_done(_: Submission) -> None:
            if not done.done():
                done.set_result(None)

        submission = self.scheduler.submit(
            examples,
            self._clock(),
            timeout_s=timeout_s,
            priority=priority,
            on_done=on_done,
            arrived=arrived,
            reserved=reserved,
        )
        try:
            self._pump()
            await done
        except asyncio.CancelledError:
            self.scheduler.cancel(submission, self._clock())
            raise
        return submission

    def drain(self) -> None:
        """From now on new work is refused; what was accepted is finished."""
        self.scheduler.admission.is_draining = True
        self._pump()

    def set_slots(self, slots: int) -> None:
        """So many batches may run at once from now on: an instance came, or is under repair."""
        self.scheduler.admission.slots = slots
        self._pump()

    # -- the pump: start batches while there are both slots and work ------------------------------

    def _pump(self) -> None:
        now = self._clock()
        self.scheduler.expire(now)
        while len(self.scheduler.running) < self.scheduler.admission.slots:
            batch = self._next_batch(now)
            if batch is None:
                break
            self._launch(batch, now)
        if len(self.scheduler.waiting) and len(self.scheduler.running) >= self.scheduler.admission.slots:
            self._executor.on_backlog()
        self._set_timer(now)

    def _next_batch(self, now: float) -> Batch | None:
        if self._staged is not None:
            batch, self._staged = self._staged, None
            if self.scheduler.drop_ended(batch, now):
                self._executor.unstage(batch)
            if batch.items:
                return batch
        ready_at = self.scheduler.ready_at(now)
        if ready_at is None or ready_at > now:
            return None
        return self.scheduler.form_batch(now)

    def _launch(self, batch: Batch, now: float) -> None:
        self.scheduler.start(batch, now)
        self._in_transit += 1
        self._arrived.clear()
        self._keep(self._run(batch))

    def _keep(self, work: Awaitable[None]) -> asyncio.Task[None]:
        # In an empty context: the batch is nobody's request, and its logs must not carry the id of
        # the one that happened to launch it.
        task = contextvars.Context().run(asyncio.ensure_future, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, batch: Batch) -> None:
        has_begun = is_free = False

        def on_model_begins() -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                self._in_transit -= 1
                if not self._in_transit:
                    self._arrived.set()

        def on_model_done(report: BatchReport) -> None:
            nonlocal is_free
            if not is_free:
                is_free = True
                self.scheduler.free_slot(batch, self._clock(), is_representative=report.runs == 1)
                self._learn_memory(batch, report)
                self._pump()

        try:
            report = await self._executor.execute(batch, on_model_begins, on_model_done)
        except Exception as bug:
            message = "this batch could not be run; the server's log has the reason"
            results = [Result(error=InternalError.of(message, bug)) for _ in batch.items]
            report = BatchReport(results, runs=0)
        on_model_begins()
        on_model_done(report)
        if self._in_transit:
            # Answers make clients send again, and that work would keep the loop from carrying the
            # next batch to the model: without this the model stood still for a tenth of the time.
            await self._arrived.wait()
        waits_s = [batch.started - item.submission.arrived for item in batch.items]
        self.scheduler.finish(batch, report.results, self._clock(), model_s=report.model_s)
        if self.observer is not None:
            try:
                self.observer.on_batch(batch, report, waits_s)
            except Exception:  # figures are worth less than the slot
                logger.exception("observer_failed")

    def _learn_memory(self, batch: Batch, report: BatchReport) -> None:
        memory = self.scheduler.admission.memory
        if not report.out_of_memory:
            if report.runs == 1 and all(result.error is None for result in report.results):
                memory.on_fitted(self._clock(), batch.cost)
            return

        def cost(span: Span) -> float:
            return sum(item.example.cost for item in batch.items[span[0] : span[1]])

        failed = min(cost(span) for span in report.out_of_memory)
        fitted = max((cost(span) for span in report.fitted), default=0.0)
        memory.on_out_of_memory(self._clock(), failed, fitted)
        logger.warning(
            "event=out_of_memory batch_cost=%g failed_cost=%g max_batch_cost_now=%g",
            batch.cost,
            failed,
            self.scheduler.admission.max_batch_cost,
        )

    # -- one timer for all that time alone decides -------------------------------------------------

    def _set_timer(self, now: float) -> None:
        due = min(self._next_ready(now), self._next_stage(now), self._next_deadline())
        if due == self._wake_at:
            return
        # A timer that fires too early is harmless; re-arming for each request would not be free.
        if self._wake is not None:
            if self._wake_at <= due:
                return
            self._wake.cancel()
            self._wake = None
        self._wake_at = due
        if due < float("inf"):
            self._wake = asyncio.get_running_loop().call_later(
                max(0.0, due - now), self._on_timer, context=contextvars.Context()
            )

    def _on_timer(self) -> None:
        self._wake, self._wake_at = None, float("inf")
        now = self._clock()
        if self._next_stage(now) <= now:
            self._stage(now)
        self._pump()

    def _next_deadline(self) -> float:
        deadline = self.scheduler.next_deadline()
        return float("inf") if deadline is None else deadline

    def _next_ready(self, now: float) -> float:
        if len(self.scheduler.running) >= self.scheduler.admission.slots:
            return float("inf")
        ready_at = self.scheduler.ready_at(now)
        return float("inf") if ready_at is None else ready_at

    def _next_stage(self, now: float) -> float:
        lead_s = self._executor.stage_lead_s()
        running = self.scheduler.running
        is_busy = running and len(running) >= self.scheduler.admission.slots
        if lead_s <= 0.0 or self._staged is not None or not is_busy or not len(self.scheduler.waiting):
            return float("inf")
        return max(now, min(batch.expected_end for batch in running) - lead_s)

    def _stage(self, now: float) -> None:
        batch = self.scheduler.form_batch(now)
        if batch is not None:
            self._staged = batch
            self._keep(self._executor.stage(batch))
