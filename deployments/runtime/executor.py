"""Runs batches on model threads: one slot, one thread, one batch at a time.

Owns: which slot runs a batch, how many there are now, what happens to one whose instance raised or hung,
staging on a GPU. Must not know: queues, HTTP, Ray (the shell passes a `hop` through which a group reaches its
slot).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from deployments.core.batcher import BatchReport
from deployments.core.errors import ModelFailed
from deployments.core.submission import Batch, Example, Result
from deployments.runtime.adapter import Adapter
from deployments.runtime.batch_run import BatchRun, Way
from deployments.runtime.device import Staged
from deployments.runtime.memory import Budget
from deployments.runtime.slots import Growth, Instances, MakeModel, Sharing, Slot

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Between two attempts to make an instance where none is left."""
MOST_HUNG = 3
"""Threads given up in a pool before the whole replica is called unhealthy: what hangs can't be ended."""


class Group:
    """A batch on its way to a slot: its items stay together whatever carries them there."""

    def __init__(self, batch: Batch, start: Callable[[], Awaitable[BatchReport]]) -> None:
        self.size = len(batch.items)
        self._start = start
        self._run: asyncio.Future[BatchReport] | None = None

    async def run(self) -> Sequence[Result]:
        """Run the group, once, however many ask; one result an item, in order. Never raises."""
        return (await self.report()).results

    async def report(self) -> BatchReport:
        if self._run is None:
            self._run = asyncio.ensure_future(self._start())
        return await self._run


Hop = Callable[[Group], Awaitable[None]]
"""Carries a group to its slot: awaits `group.run()` somewhere on the way."""


async def direct_hop(group: Group) -> None:
    """Without Ray: straight to the slot."""
    await group.run()


class ModelExecutor:
    """The Executor of one replica.

    make: an unloaded instance. on_slots: told how many batches may run at once whenever that changes.
    max_batch_cost: bound of what runs together where costs are known on the model thread alone.
    """

    def __init__(self, make: MakeModel, *, hop: Hop = direct_hop) -> None:
        self._instances = Instances(make)
        self._slots = [Slot(0)]
        self._free: list[Slot] = []
        self._hop = hop
        self._staged: dict[int, asyncio.Future[tuple[Staged, float, float]]] = {}
        self._copy_s = 0.0
        self._sharing = Sharing()
        self._growth: Growth | None = None
        self._budget: Budget | None = None
        self._alone = asyncio.Lock()
        self._is_open = True
        self._came_back = asyncio.Condition()
        self._making = 0
        self._waits = 0
        self._numbers = 1
        self._empty_since: float | None = None
        self._tasks: set[asyncio.Future[Any]] = set()
        self.on_slots: Callable[[int], None] = lambda slots: None
        self.has_lost_device = False
        self.renewed = self.hung = 0
        self.max_batch_cost: float | None = None

    # -- start and stop -----------------------------------------------------------------------------

    async def load(self, device: str, threads: int) -> Adapter:
        """The first instance, on its own model thread; raises what `load` raises.

        threads: of torch, inside an operator.
        """
        first = self._slots[0]
        self._instances.threads = threads
        await first.thread.call(lambda: self._instances.prepare(first, own_stream=False))
        return await first.thread.call(lambda: self._instances.load_first(first, device))

    async def arrange(self, sharing: Sharing, threads: int, budget: Budget) -> None:
        """Make the slots that `sharing` says. threads: of torch, for all slots together.

        A pool begins with one instance; the others come when work waits for them.
        """
        self._sharing, self._budget = sharing, budget
        self._instances.threads = max(1, threads // sharing.slots)
        if sharing.mode == "pool":
            self._growth = Growth(sharing.slots, budget)
        elif sharing.is_shared:
            self._slots += [Slot(number) for number in range(1, sharing.slots)]
        for slot in self._slots:
            slot.instance = self._slots[0].instance
            await self._prepare(slot)
        self._free = list(self._slots)

    async def _prepare(self, slot: Slot) -> None:
        many = self._sharing.slots > 1
        await slot.thread.call(lambda: self._instances.prepare(slot, own_stream=many))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for slot in self._slots:
            slot.thread.close()

    # -- health -------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return len(self._slots)

    def busy_for_s(self) -> float:
        """The longest any slot has been running its current batch; the heartbeat of check_health."""
        return max(
            (slot.thread.busy_for_s() for slot in self._slots if slot.making_since is None), default=0.0
        )

    def empty_for_s(self) -> float:
        """How long there has been no instance at all: one that raised is being replaced."""
        return 0.0 if self._empty_since is None else time.monotonic() - self._empty_since

    @property
    def is_alive(self) -> bool:
        return all(slot.thread.is_alive for slot in self._slots)

    @property
    def has_hung_often(self) -> bool:
        """Whether a pool has lost too many threads to calls that never return: those can't be ended."""
        return self.hung >= MOST_HUNG

    async def give_up_hung(self, after_s: float) -> None:
        """In a pool: let go of instances that have run one batch for longer; its items fail, a fresh instance
        with its own thread takes their place. Call it about once a second."""
        if self._growth is None:
            return
        for slot in [s for s in self._slots if s.thread.busy_for_s() > after_s and s.making_since is None]:
            if slot.running is None:
                continue
            self.hung += 1
            logger.error("event=instance_hung after_s=%.0f instances_given_up=%d", after_s, self.hung)
            running, slot.running = slot.running, None
            if not running.done():
                running.set_exception(InstanceHung(f"the model gave no answer in {after_s:.0f} s"))
            slot.is_given_up = True
            slot.thread.close()
            self._remove(slot)
        await self._notify()

    # -- Executor ---------------------------------------------------------------------------------

    async def execute(
        self,
        batch: Batch,
        on_model_begins: Callable[[], None],
        on_model_done: Callable[[BatchReport], None],
    ) -> BatchReport:
        async def start() -> BatchReport:
            report = await self._run(batch, on_model_begins)
            on_model_done(report)
            return report

        group = Group(batch, start)
        await self._hop(group)
        return await group.report()

    async def _run(self, batch: Batch, on_model_begins: Callable[[], None]) -> BatchReport:
        slot = await self._take()
        has_company = self._in_use > 1
        try:
            staged = await self._take_staged(batch)
            examples = [item.example.value for item in batch.items]
            report = await self._run_in(slot, examples, staged, on_model_begins)
            has_company = has_company or self._in_use > 1
        except InstanceHung as hung:
            # runs=0: how long it took says nothing of how long batches take.
            return BatchReport([_hung(hung) for _ in batch.items], runs=0)
        finally:
            await self._return(slot)
        if report.too_big and has_company:
            report = await self._run_alone(examples, report)
        return report

    async def _take(self) -> Slot:
        """A free slot: there is one, but for moments in which somebody runs alone, or an instance is lost."""
        if self._is_open and self._free:
            return self._free.pop()
        return await self._take_when(lambda: self._is_open and bool(self._free))

    async def _take_when(self, is_so: Callable[[], bool]) -> Slot:
        self._waits += 1
        try:
            async with self._came_back:
                await self._came_back.wait_for(is_so)
                return self._free.pop()
        finally:
            self._waits -= 1

    async def _run_in(
        self,
        slot: Slot,
        examples: Sequence[Any],
        staged: tuple[Staged, float] | None,
        on_model_begins: Callable[[], None] = lambda: None,
    ) -> BatchReport:
        way = Way(self._sharing, self.max_batch_cost, self._budget)
        run = BatchRun(self._instances, slot, way, self._on_device_lost)
        slot.running = slot.thread.call(lambda: run(examples, staged))
        on_model_begins()
        try:
            report: BatchReport = await slot.running
            return report
        finally:
            slot.running = None

    async def _run_alone(self, examples: Sequence[Any], report: BatchReport) -> BatchReport:
        """Items that ran out of memory by themselves, once more while no other slot uses any."""
        results = list(report.results)
        async with self._alone:
            self._is_open = False
            try:
                for index in report.too_big:
                    slot = await self._take_when(self._is_quiet)
                    try:
                        again = await self._run_in(slot, [examples[index]], None)
                        results[index] = again.results[0]
                    except InstanceHung as hung:
                        results[index] = _hung(hung)
                    finally:
                        await self._return(slot)
            finally:
                self._is_open = True
                await self._notify()
        # Waiting was part of it: no time to learn from.
        return replace(report, results=results, too_big=(), runs=max(2, report.runs))

    @property
    def _in_use(self) -> int:
        """Instances that run or are being made: they all use memory."""
        return len(self._slots) - len(self._free) + self._making

    def _is_quiet(self) -> bool:
        return bool(self._slots) and not self._in_use

    async def _return(self, slot: Slot) -> None:
        """A slot is free again, or its instance is made anew first."""
        if slot in self._slots:  # else it was given up
            if slot.is_clean or not self._renews:
                self._free.append(slot)
            elif self._growth is not None:
                slot.thread.close()
                self._remove(slot)
            else:
                self._remove(slot)
                self._keep(self._renew(slot))
        await self._notify()

    @property
    def _renews(self) -> bool:
        """Whether an instance that raised is replaced: where evidence, or the configuration, says that it
        may keep notes."""
        return self._sharing.is_whole

    async def _notify(self) -> None:
        """Whoever waits for a slot, or to be alone, looks again."""
        if self._waits:
            async with self._came_back:
                self._came_back.notify_all()

    def _on_device_lost(self) -> None:
        self.has_lost_device = True

    # -- the pool -----------------------------------------------------------------------------------

    def on_backlog(self) -> None:
        """Work waits while every slot is busy: make one more instance where the pool may have it."""
        if self._growth is not None and self._is_open and self._growth.may(len(self._slots)):
            self._grow()

    def _grow(self) -> None:
        assert self._growth is not None
        self._growth.is_making = True
        self._keep(self._renew(Slot(self._numbers)))
        self._numbers += 1

    def _remove(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.renewed += 1
        if not self._slots:
            self._empty_since = time.monotonic()
        self.on_slots(len(self._slots))
        if not self._slots and self._growth is not None and not self._growth.is_making:
            self._grow()

    async def _renew(self, slot: Slot) -> None:
        """Make a slot's instance, then let it take batches; tried again where none is left."""
        growth, budget = self._growth, self._budget
        before = budget.used() if budget is not None else 0
        self._making += 1
        try:
            await self._prepare(slot)
            await slot.thread.call(lambda: self._instances.renew(slot))
        except Exception:
            logger.exception("event=instance_failed")
            slot.thread.close()
            if not self._slots:  # a growth is still under way: none begins beside it
                await asyncio.sleep(RETRY_S)
                self._keep(self._renew(Slot(0)))
            elif growth is not None:
                growth.on_failed()
            return
        except asyncio.CancelledError:
            slot.thread.close()
            raise
        finally:
            self._making -= 1
        if growth is not None:
            growth.on_made((budget.used() if budget is not None else 0) - before)
        self._slots.append(slot)
        self._free.append(slot)
        self._empty_since = None
        logger.info("event=instance_made instances=%d", len(self._slots))
        self.on_slots(len(self._slots))
        await self._notify()

    def _keep(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- staging --------------------------------------------------------------------------------------

    async def _take_staged(self, batch: Batch) -> tuple[Staged, float] | None:
        staging = self._staged.pop(id(batch), None)
        if staging is None:
            return None
        try:
            staged, _, padding_share = await staging
        except Exception:
            return None
        return staged, padding_share

    async def measure_copy(self, examples: Sequence[Example]) -> None:
        """On a GPU, once: how long collating and copying a batch takes; staging is off before."""
        if not self._sharing.is_shared:  # collate is the instance's own, and may use what forward notes on it
            return
        values = [example.value for example in examples]
        for _ in range(2):  # the first pins memory
            _, self._copy_s, _ = await asyncio.get_running_loop().run_in_executor(
                None, _stage, self._first, values
            )

    @property
    def _first(self) -> Adapter:
        first = self._slots[0].instance
        assert first is not None, "load() first"
        return first

    def stage_lead_s(self) -> float:
        """Twice the measured copy time: the copy is done when the slot is free, and not long before."""
        return 2.0 * self._copy_s

    async def stage(self, batch: Batch) -> None:
        """Collate and copy off the model thread; what fails here fails again, isolated, in the run."""
        examples = [item.example.value for item in batch.items]
        staging = asyncio.get_running_loop().run_in_executor(None, _stage, self._first, examples)
        self._staged[id(batch)] = staging
        try:
            self._copy_s = (await staging)[1]
        except Exception:
            self._staged.pop(id(batch), None)

    def unstage(self, batch: Batch) -> None:
        """Somebody left the staged batch: collate it again, smaller, when it runs."""
        self._staged.pop(id(batch), None)


def _hung(hung: "InstanceHung") -> Result:
    return Result(error=ModelFailed(f"{hung}; it was given up and replaced"))


class InstanceHung(Exception):
    """The call never returned, and nobody waits for it any more."""


def _stage(adapter: Adapter, examples: Sequence[Any]) -> tuple[Staged, float, float]:
    """On a pool thread: (the batch on its way to the device, seconds it took, its padding share)."""
    started = time.perf_counter()
    collated = adapter.collate(examples)
    staged = adapter.stage(collated)
    return staged, time.perf_counter() - started, adapter.padding_share(examples, collated)
