"""One batch on its model thread: run, split where it raises, timed.

Owns: the way of a batch through one instance, and when that instance is no longer trusted. Must not know:
which slot or batch comes next.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.core.batcher import BatchReport
from deployments.core.errors import InvalidItem, ModelBroken
from deployments.core.isolate import run_isolated
from deployments.runtime.adapter import is_out_of_memory
from deployments.runtime.device import Staged, is_device_lost, on_stream
from deployments.runtime.memory import Budget, release_memory
from deployments.runtime.slots import Instances, Sharing, Slot
from deployments.runtime.whole import answer, spoils


@dataclass(frozen=True, slots=True)
class Way:
    """How batches of a replica run. max_cost: of what runs together, where `sharing.is_whole`."""

    sharing: Sharing
    max_cost: float | None = None
    budget: Budget | None = None


class BatchRun:
    """Call it once, on the slot's thread."""

    def __init__(
        self, instances: Instances, slot: Slot, way: Way, on_device_lost: Callable[[], None]
    ) -> None:
        self._instances, self._slot, self._way = instances, slot, way
        self._on_device_lost = on_device_lost
        self._staged: Staged | None = None
        self._padding_share = 0.0

    def __call__(self, examples: Sequence[Any], staged: tuple[Staged, float] | None) -> BatchReport:
        if staged is not None:
            self._staged, self._padding_share = staged
        started = time.perf_counter()
        with on_stream(self._slot.stream):
            report = run_isolated(
                self._forward,
                examples,
                is_out_of_memory=is_out_of_memory,
                on_out_of_memory=release_memory,
                # Where each failure costs a fresh instance, one by one costs two of them, halves many.
                halves=not self._way.sharing.is_whole,
            )
        out_of_memory = report.out_of_memory
        if not out_of_memory and len(examples) > 1 and self._is_over_budget():
            out_of_memory = [(0, len(examples))]
        return BatchReport(
            results=report.results,
            model_s=time.perf_counter() - started,
            runs=report.runs,
            out_of_memory=out_of_memory,
            fitted=report.fitted,
            too_big=report.too_big,
            padding_share=self._padding_share,
        )

    def _is_over_budget(self) -> bool:
        return self._way.budget is not None and self._way.budget.is_exceeded()

    def _forward(self, examples: Sequence[Any]) -> list[Any]:
        slot = self._slot
        if slot.is_given_up:
            raise ModelBroken("nobody waits for this call any more")
        if self._way.sharing.is_shared:
            assert slot.instance is not None
            adapter = slot.instance
        else:
            adapter = self._instances.clean(slot)
        # Only the whole batch was staged; the halves of a failed one are collated anew.
        staged, self._staged = self._staged, None
        try:
            if self._way.sharing.is_whole:
                answered = answer(adapter, examples, self._way.max_cost)
                slot.is_clean = slot.is_clean and not spoils(answered)
                return list(answered)
            if staged is not None:
                return adapter.split(adapter.forward(staged), len(examples))
            collated = adapter.collate(examples)
            self._padding_share = adapter.padding_share(examples, collated)
            return adapter.split(adapter.forward(collated), len(examples))
        except BaseException as error:
            # Half a call may have left half of its notes on an instance that keeps any.
            if self._way.sharing.is_whole and not isinstance(error, InvalidItem):
                slot.is_clean = False
            if is_device_lost(error):
                self._on_device_lost()
            raise
        finally:
            if slot.tied is not None and slot.tied.is_written:
                self._instances.stop_tying()
