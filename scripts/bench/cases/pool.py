"""Memory of a pool of four MiniLM instances against one: resident, in a process of its own each."""

from typing import Any

from deployments.core.contract import Limits
from deployments.runtime.memory import release_memory, resident_bytes
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing
from scripts.bench import inputs
from scripts.bench.in_process import closed_loop, in_own_process
from scripts.bench.report import Report, most, say

TARGET = "deployments.models.minilm:MiniLM"
SIZES = (1, 4)


def run(*, is_short: bool) -> Report:
    rounds = 1 if is_short else 3
    figures: dict[str, Any] = {"resident_mib": {}, "instances": {}}
    for _ in range(rounds):
        for size in SIZES:
            found = in_own_process(
                _work, TARGET, Limits(slots=size, max_batch_size=8), Sharing("pool", size, is_whole=True)
            )
            say(f"  {size}: {found}")
            figures["instances"][str(size)] = found["instances"]
            figures["resident_mib"].setdefault(str(size), []).append(found["resident_mib"])
    one, four = (sorted(figures["resident_mib"][str(size)])[rounds // 2] for size in SIZES)
    figures["ratio"] = round(four / one, 3)
    return Report("pool", figures, [most("ratio", 1.15)], {"model": TARGET, "rounds": rounds}, is_short)


async def _work(service: ModelService) -> dict[str, Any]:
    """Enough at once that the pool grows to its full size, and then the memory that stays."""
    for _ in range(20):
        await closed_loop(service, inputs.texts()[:64], 32)
        if service.stats()["slots"]["now"] == service.limits.slots:
            break
    await closed_loop(service, inputs.texts()[:64], 32)
    release_memory()
    return {
        "instances": service.stats()["slots"]["now"],
        "resident_mib": round(resident_bytes() / 2**20, 1),
    }
