"""Slots: a thread each, and the instance of the model that it uses.

Owns: how instances are made, tied to the first one's weights, warmed up, replaced after they raised or
hung; a pool's growth. Must not know: batches, queues, why the mode was chosen. An instance is used by one
batch at a time unless threads may share it. One is made at a time: loading, compiling and first calls are
not thread-safe in torch (pytorch 103793).
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deployments.runtime.adapter import Adapter
from deployments.runtime.copies import Tied, Weights
from deployments.runtime.device import on_stream, set_threads
from deployments.runtime.memory import Budget, release_memory
from deployments.runtime.model_thread import ModelThread

logger = logging.getLogger(__name__)

MakeModel = Callable[[], Adapter]


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a replica uses its model.

    mode: `shared` (one instance for all slots), `pool` (an instance a slot), `processes` or `exclusive` (one
    slot). max_batch_size: what the evidence allows in a batch, None: as configured.
    is_whole: a request's way through preprocess, forward and postprocess is one call of one instance, so that
    nothing a model notes on itself meets another item's. in_order: nobody is overtaken.
    """

    mode: str = "exclusive"
    slots: int = 1
    max_batch_size: int | None = None
    is_whole: bool = False
    in_order: bool = False
    verdict: str = ""
    reason: str = ""

    @property
    def is_shared(self) -> bool:
        return self.mode == "shared"


class Slot:
    """One thread and the instance that it runs. is_clean False: the instance raised, a fresh one comes first.

    tied: what the instance shares with the first one; None for the first itself.
    """

    def __init__(self, number: int) -> None:
        self.instance: Adapter | None = None
        self.tied: Tied | None = None
        self.is_clean = True
        self.generation = 0
        self.thread = ModelThread(f"model-{number}")
        self.stream: torch.cuda.Stream | None = None
        self.running: asyncio.Future[Any] | None = None


class Instances:
    """Makes instances, each in its slot's thread.

    make: an unloaded adapter. threads: torch's, in each slot.
    """

    def __init__(self, make: MakeModel) -> None:
        self._make = make
        self._device = "cpu"
        self._lock = threading.Lock()
        self._weights: Weights | None = None
        self._ties = True
        self.threads = 1
        self.generation = 0

    def load_first(self, device: str) -> Adapter:
        """The first instance; on its slot's thread. Raises what the model raises."""
        self._device = device
        first = self._make()
        first.load(device)
        self._weights = Weights(first.model)
        return first

    def prepare(self, slot: Slot, *, own_stream: bool) -> None:
        """On the slot's thread: its number of torch's threads and, on a GPU, a stream of its own."""
        # OpenMP keeps the count by thread: setting it anywhere else would not hold here.
        set_threads(self.threads)
        if own_stream and torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)  # weights were copied on the default stream
            slot.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def renew(self, slot: Slot) -> Adapter:
        """Give the slot a fresh instance; on its thread. Raises what the model raises."""
        assert self._weights is not None
        slot.instance = None  # its memory first
        with self._lock, on_stream(slot.stream):
            fresh = self._make()
            fresh.load(self._device)
            slot.generation = self.generation
            if self._ties:
                slot.tied = self._weights.tie(fresh.model)
                release_memory()  # the weights that were loaded only to be given up
            warm_up(fresh)
        slot.instance, slot.is_clean = fresh, True
        return fresh

    def clean(self, slot: Slot) -> Adapter:
        """The slot's instance, a fresh one where the last one raised; on its thread."""
        is_current = slot.is_clean and slot.generation == self.generation
        return slot.instance if slot.instance is not None and is_current else self.renew(slot)

    def stop_tying(self) -> None:
        """A call wrote to shared weights: no instance shares any from its next call on."""
        if self._ties:
            logger.error("event=shared_weights_written: each instance gets its own; audit the model again")
            self._ties = False
            self.generation += 1


def warm_up(adapter: Adapter) -> None:
    """The first calls of an instance, on its thread: allocations, packing, profiling scripts."""
    examples = adapter.examples()
    for _ in range(2):
        for item in examples[:2]:
            for raw in adapter.forward_batch([adapter.preprocess(item)]):
                adapter.postprocess(raw)


class Growth:
    """When a pool makes one more instance: work waits, none is being made, memory allows it."""

    def __init__(self, most: int, budget: Budget) -> None:
        self._most, self._budget = most, budget
        self._cost_bytes = 0
        self.is_making = False

    def may(self, now: int) -> bool:
        if self.is_making or now >= self._most:
            return False
        if self._budget.used() + self._cost_bytes <= self._budget.bytes:
            return True
        logger.warning("event=pool_full_of_memory instances=%d budget=%d", now, self._budget.bytes)
        self._most = now
        return False

    def learn(self, before: int) -> None:
        """What the last instance took beyond the shared weights, from what was used `before` it."""
        self._cost_bytes = max(self._cost_bytes, self._budget.used() - before)
