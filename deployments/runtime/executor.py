"""Runs batches on model threads: one slot, one thread, one batch at a time.

Owns: which instance a slot uses, what runs on its thread, staging on a GPU. Must not know: queues,
HTTP, Ray (the shell passes a `hop` through which a group reaches its slot).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from deployments.core.batcher import BatchReport
from deployments.core.isolate import Isolated, run_isolated
from deployments.core.submission import Batch, Example, Result
from deployments.runtime.adapter import Adapter, is_out_of_memory
from deployments.runtime.device import Staged, is_device_lost, release_memory, set_threads
from deployments.runtime.model_thread import ModelThread


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

    instances: one a slot; the same one several times where threads may share it. All are loaded.
    """

    def __init__(self, instances: Sequence[Adapter], *, hop: Hop = direct_hop) -> None:
        self._slots = [(adapter, ModelThread(f"model-{number}")) for number, adapter in enumerate(instances)]
        self._free = list(self._slots)
        self._hop = hop
        self._staged: dict[int, asyncio.Future[tuple[Staged, float, float]]] = {}
        self._copy_s = 0.0
        self.has_lost_device = False

    async def load(self, device: str, threads: int) -> None:
        """Load every distinct instance on its own model thread; raises what `load` raises.

        threads: of torch, inside an operator, for all slots together.
        """
        loaded: set[int] = set()
        for adapter, thread in self._slots:
            # OpenMP keeps the count by thread: setting it anywhere else would not hold here.
            await thread.call(lambda: set_threads(max(1, threads // len(self._slots))))
            if id(adapter) not in loaded:
                loaded.add(id(adapter))
                await thread.call(lambda adapter=adapter: adapter.load(device))  # type: ignore[misc]

    def busy_for_s(self) -> float:
        """The longest any slot has been running its current batch; the heartbeat of check_health."""
        return max(thread.busy_for_s() for _, thread in self._slots)

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive for _, thread in self._slots)

    def close(self) -> None:
        for _, thread in self._slots:
            thread.close()

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
        adapter, thread = self._free.pop()
        try:
            staged = await self._take_staged(batch)
            examples = [item.example.value for item in batch.items]
            running = thread.call(lambda: _Run(adapter, staged, self._on_device_lost)(examples))
            on_model_begins()
            return await running
        finally:
            self._free.append((adapter, thread))

    async def _take_staged(self, batch: Batch) -> tuple[Staged, float] | None:
        staging = self._staged.pop(id(batch), None)
        if staging is None:
            return None
        try:
            staged, _, padding_share = await staging
        except Exception:
            return None
        return staged, padding_share

    def _on_device_lost(self) -> None:
        self.has_lost_device = True

    async def measure_copy(self, examples: Sequence[Example]) -> None:
        """On a GPU, once: how long collating and copying a batch takes; staging is off before."""
        values = [example.value for example in examples]
        for _ in range(2):  # the first pins memory
            _, self._copy_s, _ = await asyncio.get_running_loop().run_in_executor(
                None, _stage, self._slots[0][0], values
            )

    def stage_lead_s(self) -> float:
        """Twice the measured copy time: the copy is done when the slot is free, and not long before."""
        return 2.0 * self._copy_s

    async def stage(self, batch: Batch) -> None:
        """Collate and copy off the model thread; what fails here fails again, isolated, in the run."""
        adapter = self._slots[0][0]
        examples = [item.example.value for item in batch.items]
        staging = asyncio.get_running_loop().run_in_executor(None, _stage, adapter, examples)
        self._staged[id(batch)] = staging
        try:
            self._copy_s = (await staging)[1]
        except Exception:
            self._staged.pop(id(batch), None)

    def unstage(self, batch: Batch) -> None:
        """Somebody left the staged batch: collate it again, smaller, when it runs."""
        self._staged.pop(id(batch), None)


def _stage(adapter: Adapter, examples: Sequence[Any]) -> tuple[Staged, float, float]:
    """On a pool thread: (the batch on its way to the device, seconds it took, its padding share)."""
    started = time.perf_counter()
    collated = adapter.collate(examples)
    staged = adapter.stage(collated)
    return staged, time.perf_counter() - started, adapter.padding_share(examples, collated)


class _Run:
    """One batch on the model thread: run, split on failure, time it."""

    def __init__(
        self, adapter: Adapter, staged: tuple[Staged, float] | None, on_device_lost: Callable[[], None]
    ) -> None:
        self._adapter = adapter
        self._staged = None if staged is None else staged[0]
        self._padding_share = 0.0 if staged is None else staged[1]
        self._on_device_lost = on_device_lost

    def __call__(self, examples: Sequence[Any]) -> BatchReport:
        started = time.perf_counter()
        report: Isolated = run_isolated(
            self._forward,
            examples,
            is_out_of_memory=is_out_of_memory,
            on_out_of_memory=release_memory,
        )
        return BatchReport(
            results=report.results,
            model_s=time.perf_counter() - started,
            runs=report.runs,
            out_of_memory_items=report.out_of_memory_items,
            padding_share=self._padding_share,
        )

    def _forward(self, examples: Sequence[Any]) -> list[Any]:
        adapter = self._adapter
        # Only the whole batch was staged; the halves of a failed one are collated anew.
        staged, self._staged = self._staged, None
        try:
            if staged is not None:
                return adapter.split(adapter.forward(staged), len(examples))
            collated = adapter.collate(examples)
            self._padding_share = adapter.padding_share(examples, collated)
            return adapter.split(adapter.forward(collated), len(examples))
        except BaseException as error:
            if is_device_lost(error):
                self._on_device_lost()
            raise
