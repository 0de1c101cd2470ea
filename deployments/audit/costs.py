"""What an instance and an item cost, and what a second thread, a second instance or a batch would gain.

Owns: these measurements, on the machine as it is now. Must not know: properties. Rounds of all ways are
interleaved and the medians compared: a shared machine drifts more than the ways differ.
Source: Triton issues 4387, 5736, 7579, whose authors ask why more instances are not faster.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deployments.audit.subject import Subject
from deployments.audit.target import Batch, Input
from deployments.runtime.memory import peak_bytes, reset_peak

ROUNDS = 5
LATEST = 1.5
"""Times its seconds it may take for all rounds; one round at least."""
LEAST_S = 0.05
"""Of one way in one round."""
BATCH = 8
GAINS = 1.25
"""Times the speed of one: less is not worth a second instance."""
FULL = 0.8
"""Of the cores: the rest goes to starting and ending a parallel region."""


class Costs:
    """Of two instances. threads: cores of the machine; each way uses them all."""

    def __init__(self, subjects: Sequence[Subject], threads: int, seconds: float) -> None:
        self._subjects, self._threads, self._seconds = subjects, threads, seconds
        self._item = Input(0)

    def memory(self, device: str) -> dict[str, Any]:
        """Of an item: what a batch takes at its peak beyond the least batch, shared out."""
        subject, item = self._subjects[0], self._item
        if torch.device(device).type == "cuda":
            one, many = (self._cuda_peak(subject, (item,) * count) for count in (1, BATCH))
        else:
            one, many = (self._cpu_peak(subject, (item,) * count) for count in (1, BATCH))
        return {"item_bytes": max(0, (many - one) // (BATCH - 1))}

    @staticmethod
    def _cpu_peak(subject: Subject, batch: Batch) -> int:
        reset_peak()
        subject.call(batch)
        return peak_bytes()

    @staticmethod
    def _cuda_peak(subject: Subject, batch: Batch) -> int:
        torch.cuda.reset_peak_memory_stats()
        subject.call(batch)
        return torch.cuda.max_memory_allocated()

    def speed(self, *, is_shareable: bool) -> dict[str, Any]:
        """Items/s of one thread, and of the other ways as multiples of it; cores that each way keeps busy,
        and what follows. is_shareable: two threads in one instance are worth a look; racing an unsafe one may
        end the process."""
        first, second = self._subjects[0], self._subjects[-1]
        batch = (self._item,) * BATCH
        ways: dict[str, Callable[[float], float]] = {
            "one": lambda s: self._rate([(first, (self._item,))], s),
            "two_threads_one_instance": lambda s: self._rate([(first, (self._item,))] * 2, s),
            "pool_of_2": lambda s: self._rate([(first, (self._item,)), (second, (self._item,))], s),
            f"batch_of_{BATCH}": lambda s: self._rate([(first, batch)], s),
        }
        if not is_shareable:
            ways.pop("two_threads_one_instance")
        if not first.can_batch:
            ways.pop(f"batch_of_{BATCH}")
        each_s = max(LEAST_S, self._seconds / (ROUNDS * len(ways)))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        deadline = time.monotonic() + LATEST * self._seconds
        while len(rates["one"]) < ROUNDS and (not rates["one"] or time.monotonic() < deadline):
            for name, way in ways.items():
                began, used = time.monotonic(), time.process_time()
                rates[name].append(way(each_s))
                busy[name].append((time.process_time() - used) / (time.monotonic() - began))
        one = statistics.median(rates["one"])
        ratios = {
            name: round(statistics.median(r / o for r, o in zip(rates[name], rates["one"], strict=True)), 2)
            for name in ways if name != "one"
        }  # fmt: skip
        cores_busy = {name: round(statistics.median(shares), 2) for name, shares in busy.items()}
        return {
            "items_per_s": round(one, 2), "speed_up": ratios, "torch_threads": self._threads,
            "cores_busy": cores_busy, "why": why(cores_busy, ratios["pool_of_2"], self._threads),
        }  # fmt: skip

    def _rate(self, workers: Sequence[tuple[Subject, Batch]], seconds: float) -> float:
        """Items/s of all workers, who share the machine's cores."""
        counts = [0] * len(workers)
        own_threads = max(1, self._threads // len(workers))
        began = time.monotonic()
        ended: list[float] = [0.0] * len(workers)

        def work(number: int) -> None:
            torch.set_num_threads(own_threads)
            subject, batch = workers[number]
            while not counts[number] or time.monotonic() - began < seconds:
                subject.call(batch)
                counts[number] += len(batch)
            ended[number] = time.monotonic()

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(count / (end - began) for count, end in zip(counts, ended, strict=True))


def why(cores_busy: Mapping[str, float], gain: float, cores: int) -> str:
    """Why a second instance is faster, or is not: what Triton's users ask."""
    one, two = cores_busy["one"], cores_busy["pool_of_2"]
    if gain >= GAINS:
        return f"a second instance gains, since one call keeps {one:.1f} of {cores} cores busy"
    if one >= FULL * cores:
        return f"a second instance gains little: one call keeps {one:.1f} of {cores} cores busy already"
    if two >= FULL * min(2, cores):
        return (
            f"a second instance gains little though two keep {two:.1f} of {cores} cores busy: they wait for "
            "memory"
        )
    return (
        f"a second instance gains little: two keep only {two:.1f} of {cores} cores busy, since they wait for "
        "Python's lock; larger batches help, or replicas (num_replicas), which are processes"
    )
