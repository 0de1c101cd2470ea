"""A replica without Ray: items in, answers out.

Owns: the way of a request through preprocess, batcher, postprocess, and the start (load, warm-up).
Implements core's `Service`. Must not know: Ray, HTTP, what the model computes.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from deployments.core.batcher import Batcher
from deployments.core.contract import Answer, Limits, ModelCard, Outcome, RequestOptions
from deployments.core.errors import DeadlinePassed, InternalError, ServingError
from deployments.core.figures import Figures, Held, MetricsSink, NullSink
from deployments.core.machine import usable_cpus
from deployments.core.scheduler import Scheduler
from deployments.core.submission import Example, Submission
from deployments.runtime.adapter import Adapter
from deployments.runtime.executor import Hop, ModelExecutor, direct_hop
from deployments.runtime.memory import Budget, release_memory
from deployments.runtime.slots import MakeModel, Sharing
from deployments.runtime.warm_up import WarmUp
from deployments.runtime.whole import Answered, Whole

logger = logging.getLogger(__name__)

INLINE_S = 1e-3
"""A request's pre- and postprocessing up to this long (measured at warm-up) runs on the event loop;
a hop to a thread and back costs 0.1 ms."""
INLINE_BODY_BYTES = 64 * 1024
"""Items of bigger requests always leave the loop: what was cheap for an example may not be here."""
CHUNKS_PER_THREAD = 4
"""Into how many parts a long list is cut for the pool: a cancelled request stops after one."""
GAUGE_EVERY_S = 1.0
RELEASE_AFTER_S = 10.0
"""Idle for so long, and what each thread's allocator holds for the next batch goes back to the machine."""
HANG_AFTER_S = 120.0
"""A batch that runs this long is a hung model: a pool replaces the instance; otherwise check_health fails
and Ray replaces the replica."""

LOAD_WITHIN_S = 600.0
"""So long a fresh instance may take, when none is left."""

Decide = Callable[[Adapter], Awaitable[Sharing]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item after preprocessing: an example, or the error that ends it."""

    example: Example | None = None
    error: ServingError | None = None
    warning: tuple[str, str] | None = None


class ModelService:
    """One replica's model behind its batcher; all methods on one event loop.

    make: an unloaded instance; called again for each further instance of a pool.
    """

    def __init__(
        self,
        app_name: str,
        make: MakeModel,
        limits: Limits,
        *,
        replica: str = "",
        hop: Hop = direct_hop,
        sink: MetricsSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app_name = app_name
        self._replica = replica
        self._limits = limits
        self._executor = ModelExecutor(make, hop=hop)
        self._adapter_or_none: Adapter | None = None
        self.sharing = Sharing()
        self._clock = clock
        self._sink = sink or NullSink()
        self.figures = Figures(self._sink, clock)
        self._pool = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="preprocess")
        self._card: ModelCard | None = None
        self._batcher: Batcher | None = None
        self._before_s = self._after_s = float("inf")  # an item, measured at warm-up
        self._in_flight = 0
        self._gauges: asyncio.Task[None] | None = None
        self._device = "cpu"

    # -- start and stop -----------------------------------------------------------------------------

    async def start(
        self, device: str, threads: int | None = None, *, decide: Decide | None = None, gpu_share: float = 1.0
    ) -> None:
        """Load the model, warm it up; raises what the model raises. Ready when it returns.

        threads: torch's, for all slots together; None: one a usable CPU. decide: how the model may be used,
        asked once its first instance is loaded; None: an instance a slot. gpu_share: this replica's part.
        """
        self._device = device
        threads = threads or usable_cpus()
        self._memory = self._limits.memory
        self._budget = Budget(device, self._memory, gpu_share)  # a GPU's holds for loading, too
        adapter = self._adapter_or_none = await self._executor.load(device, threads)
        self._budget.check_fits()
        if decide is None:
            self.sharing = Sharing("pool" if self._limits.slots > 1 else "exclusive", self._limits.slots)
        else:
            self.sharing = await decide(adapter)
        self._limits = self._in_force(self._limits)
        self._card = adapter.card(self._app_name)
        await self._executor.arrange(self.sharing, threads, self._budget)
        scheduler = Scheduler(self._limits, mates_by_cost=adapter.pads, in_order=self.sharing.in_order)
        scheduler.admission.slots = self._executor.slots
        self._batcher = Batcher(scheduler, self._executor, clock=self._clock)
        self._executor.on_slots = self._batcher.set_slots
        await self._warm_up(list(self._card.examples))
        self.figures = self._batcher.observer = Figures(self._sink, self._clock)
        self._gauges = asyncio.ensure_future(self._push_gauges())

    def _in_force(self, limits: Limits) -> Limits:
        """The configured limits within what the model's class and the evidence allow."""
        sharing = self.sharing
        cost = self._adapter.max_batch_cost if limits.max_batch_cost is None else limits.max_batch_cost
        if sharing.is_whole:  # costs are known on the model thread alone; the door counts items
            self._executor.max_batch_cost, cost = cost, None
        size = min(limits.max_batch_size, sharing.max_batch_size or limits.max_batch_size)
        return replace(limits, slots=sharing.slots, max_batch_size=size, max_batch_cost=cost)

    @property
    def _adapter(self) -> Adapter:
        assert self._adapter_or_none is not None, "start() first"
        return self._adapter_or_none

    async def _warm_up(self, items: Sequence[Any]) -> None:
        """First requests are as fast as later ones; also learns what may run on the event loop."""

        def prepare(item: Any) -> tuple[Example | None, ServingError | None]:
            (prepared,) = self._prepare_now([item], RequestOptions())
            return prepared.example, prepared.error

        def finish(submission: Submission) -> list[Outcome]:
            return self._outcomes(submission, RequestOptions())

        first_runs = self._first_runs = WarmUp(self.batcher, self._limits, self._budget, prepare, finish)
        await first_runs.run(items)
        self._before_s, self._after_s = first_runs.before_s, first_runs.after_s
        self.batcher.scheduler.admission.memory.cap = first_runs.dearest(self._budget.bytes)
        if self._device != "cpu" and first_runs.examples:
            await self._executor.measure_copy(first_runs.examples)

    def drain(self) -> None:
        """New work gets Draining from now on; work in hand is finished."""
        self.batcher.drain()

    def close(self) -> None:
        """End the threads; call after draining."""
        if self._gauges is not None:
            self._gauges.cancel()
        self._executor.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def change_limits(self, limits: Limits) -> None:
        """Put new limits in force for what comes next; slots can't change in place."""
        self._limits = self._in_force(limits)
        self.batcher.scheduler.admission.limits = self._limits
        if limits.memory != self._memory:
            self._memory = limits.memory
            self._budget.set(limits.memory)
            self.batcher.scheduler.admission.memory.cap = self._first_runs.dearest(self._budget.bytes)

    def check_health(self) -> None:
        """Raise RuntimeError when a model thread is gone or hangs; reads a heartbeat, runs nothing."""
        if not self._executor.is_alive:
            raise RuntimeError("a model thread has ended")
        if self._executor.has_hung_often:
            raise RuntimeError("instances of the pool have hung again and again")
        if self._executor.has_lost_device:
            raise RuntimeError("the device failed and stays failed in this process")
        busy_s = self._executor.busy_for_s()
        patience_s = (2.0 if self.sharing.mode == "pool" else 1.0) * HANG_AFTER_S  # a pool helps itself
        if self._batcher is not None and busy_s > patience_s:
            raise RuntimeError(f"a batch has been running for {busy_s:.0f} s")
        if self._executor.empty_for_s() > LOAD_WITHIN_S:
            raise RuntimeError("the instance that raised could not be replaced")

    def _held(self) -> Held:
        admission = self.batcher.scheduler.admission
        return Held(
            self._executor.slots,
            self._budget.used(),
            admission.memory.failures,
            _finite(admission.max_batch_cost),
        )

    async def _push_gauges(self) -> None:
        seen, idle_s = self.figures.batches, 0.0
        while True:
            await asyncio.sleep(GAUGE_EVERY_S)
            scheduler = self.batcher.scheduler
            try:
                await self._executor.give_up_hung(HANG_AFTER_S)
                self.figures.send(len(scheduler.waiting), scheduler.waiting.cost, self._held())
                idle_s = idle_s + GAUGE_EVERY_S if self.figures.batches == seen else 0.0
                if RELEASE_AFTER_S <= idle_s < RELEASE_AFTER_S + GAUGE_EVERY_S and not self._budget.is_gpu:
                    await asyncio.to_thread(release_memory)
                seen = self.figures.batches
            except Exception:  # the loop's outermost edge
                logger.exception("metrics_failed app=%s", self._app_name)

    # -- Service --------------------------------------------------------------------------------------

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "start() first"
        return self._card

    @property
    def batcher(self) -> Batcher:
        assert self._batcher is not None, "start() first"
        return self._batcher

    @property
    def limits(self) -> Limits:
        return self._limits

    def is_ready(self) -> bool:
        return self._batcher is not None and not self._batcher.scheduler.admission.is_draining

    def count_outcome(self, status: int, *, route: str) -> None:
        self.figures.count_request(status, route)

    def check_room(self, items: int) -> None:
        self.batcher.check_room(items, timeout_s=self._limits.timeout_ms / 1e3)

    async def predict(self, items: Sequence[Any], options: RequestOptions) -> Answer:
        """See core.contract.Service."""
        self._in_flight += 1
        try:
            return await self._predict(items, options)
        finally:
            self._in_flight -= 1

    async def _predict(self, items: Sequence[Any], options: RequestOptions) -> Answer:
        arrived = self._clock()
        timeout_ms = self._limits.timeout_ms if options.timeout_ms is None else options.timeout_ms
        timeout_s, priority = timeout_ms / 1e3, options.priority
        self.batcher.reserve(len(items), timeout_s=timeout_s, priority=priority)
        try:
            prepared = await self._prepare_all(items, options, timeout_s)
        except BaseException:  # cancelled: the client left
            self.batcher.scheduler.release(len(items))
            raise
        examples = [p.example for p in prepared if p.example is not None]
        if not examples:
            self.batcher.scheduler.release(len(items))
            return Answer([Outcome(error=p.error) for p in prepared])
        submission = await self.batcher.submit(
            examples, timeout_s=timeout_s, priority=priority, arrived=arrived, reserved=len(items)
        )
        outcomes = await self._finish(submission, options)
        return self._answer(submission, prepared, outcomes, arrived)

    def _answer(
        self,
        submission: Submission,
        prepared: Sequence[Prepared],
        outcomes: Sequence[Outcome],
        arrived: float,
    ) -> Answer:
        ran = iter(outcomes)
        merged = []
        for p in prepared:
            outcome = Outcome(error=p.error) if p.example is None else next(ran)
            if p.example is not None and not self.sharing.is_whole:
                outcome.warning, outcome.cost = p.warning, p.example.cost
            merged.append(outcome)
        began = arrived if submission.began is None else submission.began
        return Answer(
            merged,
            queue_ms=1e3 * (began - arrived),
            batch_size=submission.batch_items,
            model_ms=1e3 * submission.model_s,
        )

    # -- before and after the batch ---------------------------------------------------------------

    def _is_inline(self, seconds_an_item: float, items: int) -> bool:
        # A model that reads raw media decodes: how long depends on the caller, not on our examples.
        return seconds_an_item * items <= INLINE_S and not self.card.media_types

    async def _prepare_all(
        self, items: Sequence[Any], options: RequestOptions, timeout_s: float
    ) -> list[Prepared]:
        is_small = options.body_bytes <= INLINE_BODY_BYTES and self._is_inline(self._before_s, len(items))
        if is_small or self.sharing.is_whole:
            return self._prepare_now(items, options)
        started = time.perf_counter()
        try:
            prepared = await asyncio.wait_for(self._prepare_on_pool(items), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlinePassed(
                f"not begun within {1e3 * timeout_s:.0f} ms: allow more time (timeout_ms), or send less"
            ) from None
        # What a newcomer's items add to its wait, pool and all; a tenth a time, so it follows slowly.
        scheduler = self.batcher.scheduler
        took_s = (time.perf_counter() - started) / max(1, scheduler.waiting.reserved)
        scheduler.admission.prepare_item_s += 0.1 * (took_s - scheduler.admission.prepare_item_s)
        return prepared

    async def _prepare_on_pool(self, items: Sequence[Any]) -> list[Prepared]:
        loop = asyncio.get_running_loop()
        size = max(1, len(items) // (CHUNKS_PER_THREAD * usable_cpus()))
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        done = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._prepare_part, part) for part in parts)
        )
        return [prepared for part in done for prepared in part]

    def _prepare_now(self, items: Sequence[Any], options: RequestOptions) -> list[Prepared]:
        if self.sharing.is_whole:  # its instance does it, with no other item in between
            return [Prepared(Example(Whole(item, options.as_tensors))) for item in items]
        return self._prepare_part(items)

    def _prepare_part(self, items: Sequence[Any]) -> list[Prepared]:
        return [self._prepare(item) for item in items]

    def _prepare(self, item: Any) -> Prepared:
        adapter = self._adapter
        try:
            value = adapter.preprocess(item)
            example = Example(value, adapter.key(value), adapter.cost(value))
            return Prepared(example, warning=adapter.warning(value))
        except ServingError as error:
            return Prepared(error=error)
        except Exception as bug:
            return Prepared(error=InternalError.of("this item could not be prepared", bug))

    async def _finish(self, submission: Submission, options: RequestOptions) -> list[Outcome]:
        if self._is_inline(self._after_s, len(submission.results)):
            return self._outcomes(submission, options)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._outcomes, submission, options)

    def _outcomes(self, submission: Submission, options: RequestOptions) -> list[Outcome]:
        after = self._adapter.to_tensors if options.as_tensors else self._adapter.postprocess
        outcomes = []
        for result in submission.results:
            assert result is not None, "the batcher answers when every item has its result"
            if result.error is not None:
                outcomes.append(Outcome(error=result.error))
                continue
            if isinstance(result.output, Answered):
                done = result.output
                outcomes.append(Outcome(done.value, copy(done.error), done.warning, done.cost))
                continue
            try:
                outcomes.append(Outcome(after(result.output)))
            except ServingError as error:
                outcomes.append(Outcome(error=error))
            except Exception as bug:
                outcomes.append(Outcome(error=InternalError.of("this output could not be read", bug)))
        return outcomes

    # -- figures ------------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, Any]:
        """This replica's figures; schema in docs/reference/stats.md."""
        scheduler, figures = self.batcher.scheduler, self.figures
        now = self._clock()
        return {
            "application": self._app_name,
            "replica": self._replica,
            "state": "draining" if scheduler.admission.is_draining else "ready",
            "device": self._device,
            "uptime_s": round(now - figures.started, 3),
            "in_flight": self._in_flight,
            "queue": {
                "items": len(scheduler.waiting),
                "cost": scheduler.waiting.cost,
                "oldest_age_ms": round(1e3 * scheduler.oldest_age_s(now), 3),
                "predicted_wait_ms": round(1e3 * scheduler.admission.predicted_wait_s(now), 3),
                "learned_patience_s": scheduler.admission.overload.patience_s,
            },
            "slots": {
                "total": self._limits.slots,
                "now": self._executor.slots,
                "busy": len(scheduler.running),
                "renewed": self._executor.renewed,
            },
            "safety": self.sharing.stats(),
            "memory": {
                "budget_bytes": self._budget.bytes,
                "used_bytes": self._budget.used(),
                "out_of_memory": scheduler.admission.memory.failures,
                "learned_max_cost": _finite(scheduler.admission.memory.value),
            },
            "totals": {
                "items": figures.items,
                "batches": figures.batches,
                "cost": figures.cost,
                "busy_s": round(figures.busy_s, 6),
                "split_batches": figures.splits,
                "refused": scheduler.admission.refused_items,
                "expired": scheduler.counters.expired,
                "cancelled": scheduler.counters.cancelled,
                "requests": {str(status): count for status, count in sorted(figures.statuses.items())},
            },
            "recent": figures.recent(),
            "limits": {
                "max_batch_size": self._limits.max_batch_size,
                "max_batch_cost": _finite(scheduler.admission.max_batch_cost),
                "max_queue_items": self._limits.max_queue_items,
                "cost_unit": self.card.cost_unit,
            },
        }


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
