"""Slots: a thread each, and the instance of the model that it uses.

Owns: how instances are made, tied to the first one's weights, warmed up, replaced after they raised or
hung; a pool's growth. Must not know: batches, queues, why the mode was chosen. An instance is used by one
batch at a time unless threads may share it. One is made at a time: loading, compiling and first calls are
not thread-safe in torch (pytorch 103793).
"""

import asyncio
import logging
import threading
import time
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
    nothing a model notes on itself meets another item's. in_order: nobody is overtaken. warning: that the
    evidence is against the mode. variants: what was measured of the optimised model before it serves.
    """

    mode: str = "exclusive"
    slots: int = 1
    max_batch_size: int | None = None
    is_whole: bool = False
    in_order: bool = False
    verdict: str = ""
    reason: str = ""
    warning: str = ""
    variants: str = ""

    @property
    def is_shared(self) -> bool:
        return self.mode == "shared"

    def stats(self) -> dict[str, str]:
        """What /stats says of it."""
        said = {"mode": self.mode, "verdict": self.verdict, "reason": self.reason}
        more = {"warning": self.warning, "variants": self.variants}
        return said | {name: text for name, text in more.items() if text}


class Slot:
    """One thread and the instance that it runs. is_clean False: the instance raised, a fresh one comes first.

    tied: what the instance shares with others. making_since: when the making of a fresh instance began.
    is_given_up: nobody waits for its call any more; it may still return.
    """

    def __init__(self, number: int) -> None:
        self.instance: Adapter | None = None
        self.tied: Tied | None = None
        self.is_clean = True
        self.is_given_up = False
        self.making_since: float | None = None
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
        self._first: Slot | None = None
        self._ties = True
        self.threads = 1
        self.generation = 0

    def load_first(self, slot: Slot, device: str) -> Adapter:
        """The first instance; on its slot's thread. Raises what the model raises."""
        self._device, self._first = device, slot
        slot.instance = self._make()
        slot.instance.load(device)
        self._weights = Weights(slot.instance.model)
        return slot.instance

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
        if slot is self._first:
            self._first = None
        slot.instance, slot.tied = None, None  # its memory first
        slot.making_since = time.monotonic()
        try:
            with self._lock, on_stream(slot.stream):
                fresh = self._make()
                fresh.load(self._device)
                slot.generation = self.generation
                if self._ties:
                    self._share(slot, fresh)
                warm_up(fresh)
        finally:
            slot.making_since = None
        slot.instance, slot.is_clean = fresh, True
        return fresh

    def _share(self, slot: Slot, fresh: Adapter) -> None:
        assert self._weights is not None
        slot.tied = self._weights.tie(fresh.model)
        if self._first is not None and self._first.tied is None:
            self._first.tied = self._weights.watch()
        release_memory()  # the weights that were loaded only to be given up

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
    """When a pool makes one more instance: work waits, none is being made, memory allows it.

    What was refused, or failed, is tried again after a while.
    """

    AGAIN_S = 30.0
    FAILED_S = 1.0

    def __init__(self, most: int, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._budget, self._clock = most, budget, clock
        self._cost_bytes = 0
        self._failures = 0
        self._not_before = 0.0
        self.is_making = False

    def may(self, now: int) -> bool:
        if self.is_making or now >= self._most or self._clock() < self._not_before:
            return False
        if self._budget.used() + self._cost_bytes <= self._budget.bytes:
            return True
        logger.warning("event=pool_full_of_memory instances=%d budget=%d", now, self._budget.bytes)
        self._not_before = self._clock() + self.AGAIN_S
        return False

    def on_made(self, cost_bytes: int) -> None:
        """cost_bytes: what is used more than before."""
        self._failures, self.is_making = 0, False
        self._cost_bytes = max(0, cost_bytes)

    def on_failed(self) -> None:
        self._failures, self.is_making = self._failures + 1, False
        self._not_before = self._clock() + min(self.AGAIN_S, self.FAILED_S * 2**self._failures)
