"""Memory that shrinks under load: 5,000 requests of mixed size, halfway a limit on the address space.

The limit is real (RLIMIT_AS): torch's allocator fails, as it does on a full machine. What it allows is
known from runs of the same load, in turns with it, whose `max_batch_cost` is the largest that fits.
"""

import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from deployments.core.contract import Limits
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing
from scripts.bench.in_process import closed_loop, in_own_process
from scripts.bench.report import Report, least, most, say

TARGET = "scripts.bench.unsafe_models:Roomy"
MIB = 2**20
ROOM_MIB = 28
"""Left above what the process has when the limit falls; the largest item takes 6, a full batch 96."""
COST = 384.0
CLIENTS = 96
ROUNDS = 3
SHARING = Sharing("exclusive", 1)


def run(*, is_short: bool) -> Report:
    requests = 1000 if is_short else 5000
    limits = Limits(max_batch_size=64, max_batch_cost=COST, max_queue_items=4096)
    free = in_own_process(_Work(requests, None), TARGET, limits, SHARING)
    say(f"  no limit: {free}")
    halfway, known, ratios = [], [], []
    for _ in range(1 if is_short else ROUNDS):
        shrunk = in_own_process(_Work(requests, ROOM_MIB), TARGET, limits, SHARING)
        say(f"  limit of {ROOM_MIB} MiB more halfway: {shrunk}")
        told = Limits(max_batch_size=64, max_batch_cost=float(shrunk["allowed_cost"]), max_queue_items=4096)
        best = in_own_process(_Work(requests, None), TARGET, told, SHARING)
        say(f"  max_batch_cost {shrunk['allowed_cost']} from the start: {best}")
        halfway.append(shrunk)
        known.append(best)
        ratios.append(shrunk["last_quarter_per_s"] / best["last_quarter_per_s"])
    figures = {
        "no_limit": free, "limit_halfway": halfway, "limit_known": known,
        "failed": sum(one["failed"] for one in halfway),
        "of_what_is_allowed": round(statistics.median(ratios), 3),
    }  # fmt: skip
    targets = [most("failed", 0), least("of_what_is_allowed", 0.9)]
    return Report("memory", figures, targets, {"requests": requests, "clients": CLIENTS}, is_short)


class _Work:
    """The load. room_mib: what the address space may grow by from halfway on; None: no limit."""

    def __init__(self, requests: int, room_mib: int | None) -> None:
        self._requests, self._room_mib = requests, room_mib

    async def __call__(self, service: ModelService) -> dict[str, Any]:
        source = random.Random(3)
        items = [source.choice((1, 2, 3, 4, 6, 8, 12, 24)) for _ in range(self._requests)]
        half, quarter = len(items) // 2, 3 * len(items) // 4
        first = await closed_loop(service, items[:half], CLIENTS)
        if self._room_mib is not None:
            limit = _address_space_bytes() + self._room_mib * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        second = await closed_loop(service, items[half:quarter], CLIENTS)
        began = time.perf_counter()
        third = await closed_loop(service, items[quarter:], CLIENTS)
        seconds = time.perf_counter() - began
        allowed = await self._largest_that_fits(service) if self._room_mib is not None else None
        stats = service.stats()
        outcomes = [*first, *second, *third]
        return {
            "failed": sum(outcome.error is not None for outcome in outcomes),
            "wrong": sum(
                o.error is None and o.value != float(item) for o, item in zip(outcomes, items, strict=True)
            ),
            "last_quarter_per_s": round(len(third) / seconds, 2),
            "out_of_memory_batches": stats["memory"]["out_of_memory"],
            "learned_max_cost": stats["memory"]["learned_max_cost"],
            "allowed_cost": allowed,
        }

    @staticmethod
    async def _largest_that_fits(service: ModelService) -> int:
        """By trying the model itself, largest first, on its own thread."""
        slot = service._executor._slots[0]

        def search() -> int:
            for cost in range(int(COST), 0, -2):
                try:
                    slot.instance.forward_batch([cost])  # type: ignore[union-attr]
                    return cost
                except (MemoryError, RuntimeError):
                    continue
            return 1

        return await slot.thread.call(search)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
