"""On a GPU: slots with streams of their own, and a memory budget that callers never notice.

Figures go to docs/benchmarks/results/gpu_slots.json: 1, 2 and 4 streams in one shared instance, pools of as
many, and one slot with a bigger batch, interleaved.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.core.contract import Limits, RequestOptions
from deployments.runtime.adapter import Adapter, load_class
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing
from scripts.bench import inputs, unsafe_models
from scripts.bench.in_process import closed_loop
from scripts.bench.report import hardware, versions

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MINILM = "deployments.models.minilm:MiniLM"
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "results" / "gpu_slots.json"


@asynccontextmanager
async def serving(model: type, sharing: Sharing, limits: Limits) -> AsyncIterator[ModelService]:
    async def decide(_: Adapter) -> Sharing:
        return sharing

    service = ModelService("app", lambda: Adapter(model, {}), limits)
    await service.start("cuda", decide=decide)
    try:
        yield service
    finally:
        service.close()


WAYS = {
    "shared_1": (Sharing("shared", 1), 32),
    "shared_2": (Sharing("shared", 2), 32),
    "shared_4": (Sharing("shared", 4), 32),
    "pool_2": (Sharing("pool", 2, is_whole=True), 32),
    "pool_4": (Sharing("pool", 4, is_whole=True), 32),
    "one_bigger_batch": (Sharing("shared", 1), 128),
}


async def test_streams_of_a_shared_instance_give_what_one_gives_and_are_measured() -> None:
    texts = inputs.texts()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    answers: dict[str, Any] = {}
    for _ in range(3):
        for name, (sharing, batch) in WAYS.items():
            async with serving(
                load_class(MINILM), sharing, Limits(slots=sharing.slots, max_batch_size=batch)
            ) as service:
                await closed_loop(service, texts, 256)
                began = time.perf_counter()
                outcomes = await closed_loop(service, texts * 4, 256)
                rates[name].append(len(outcomes) / (time.perf_counter() - began))
                answers[name] = torch.tensor([outcome.value for outcome in outcomes[: len(texts)]])
    for name, found in answers.items():  # bf16: who shares a batch differs from run to run
        similar = torch.nn.functional.cosine_similarity(found, answers["shared_1"])
        assert float(similar.min()) > 0.999, name
    figures = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {"texts_per_s": figures, "gpu": torch.cuda.get_device_name(), "hardware": hardware()}
            | {"versions": versions()},
            indent=1,
        )
    )


class Roomy(unsafe_models.Roomy):
    """An item of n takes n MiB of the device while it runs."""

    cost_unit = "MiB"

    def forward(self, batch: list[int]) -> list[float]:
        rows = [torch.ones(n, 2**18, device=self._device) for n in batch]
        return [float(part.sum() / 2**18) for part in rows]

    def examples(self) -> list[int]:
        return [1, 64]


@pytest.mark.parametrize("slots", [1, 2])
async def test_out_of_memory_never_reaches_a_caller(slots: int) -> None:
    """4 GiB for batches of up to 64 GiB, mixed sizes: split, learned, and every answer is right."""
    limits = Limits(slots=slots, max_batch_size=64, memory=float(4 * 2**30), max_queue_items=4096)
    sizes = [1, 7, 64, 200, 512, 1024, 31, 3] * 250
    async with serving(Roomy, Sharing("shared", slots), limits) as service:
        service.batcher.scheduler.admission.memory.cap = float("inf")  # without the prediction's help
        outcomes = await closed_loop(service, sizes, 128)
        stats = service.stats()
    assert [outcome.value for outcome in outcomes] == [float(n) for n in sizes]
    assert stats["memory"]["out_of_memory"] > 0
    assert torch.cuda.max_memory_reserved() <= 4 * 2**30


async def test_two_budgets_on_one_device_are_kept_apart() -> None:
    """Half of the share each: what one replica may not have, its allocator refuses."""
    async with serving(Roomy, Sharing("shared", 1), Limits(memory=0.25)) as service:
        total = torch.cuda.get_device_properties(0).total_memory
        assert service.stats()["memory"]["budget_bytes"] == int(0.25 * total)
        too_much = int(0.4 * total / 2**20)
        answer = await service.predict([too_much], RequestOptions())
        assert "does not fit" in str(answer.outcomes[0].error)
        await asyncio.sleep(0)
