"""A replica's service without Ray: preprocess, batch, postprocess, and what goes wrong between."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from deployments.core.contract import Answer, Limits, RequestOptions
from deployments.core.errors import DeadlinePassed, Draining, InvalidItem, ModelBroken, ModelFailed
from deployments.runtime.adapter import Adapter
from deployments.runtime.service import ModelService
from tests import user_models

LIMITS = Limits(max_batch_size=8)


@asynccontextmanager
async def serving(model: type, limits: Limits = LIMITS) -> AsyncIterator[ModelService]:
    service = ModelService("app", lambda: Adapter(model, {}), limits)
    await service.start("cpu")
    try:
        yield service
    finally:
        service.close()


async def ask(service: ModelService, *items: Any, **options: Any) -> Answer:
    return await service.predict(items, RequestOptions(**options))


def values(answer: Answer) -> list[Any]:
    return [o.error or o.value for o in answer.outcomes]


async def test_a_request_comes_back_in_order_with_its_timing() -> None:
    async with serving(user_models.Doubler) as service:
        answer = await ask(service, [1, 2, 3, 4], [5, 6, 7, 8])
    assert values(answer) == [[2, 4, 6, 8], [10, 12, 14, 16]]
    assert answer.batch_size == 2
    assert answer.model_ms > 0.0


async def test_an_item_the_model_can_not_take_fails_alone() -> None:
    async with serving(user_models.Doubler) as service:
        good, short, text = values(await ask(service, [1, 2, 3, 4], [1, 2, 3], "text"))
    assert good == [2, 4, 6, 8]
    assert isinstance(short, InvalidItem)
    assert isinstance(text, InvalidItem)


async def test_tensors_go_in_and_out_for_binary_protocols() -> None:
    async with serving(user_models.Doubler) as service:
        answer = await ask(service, np.ones(4, dtype=np.float32), as_tensors=True)
    assert answer.outcomes[0].value["y"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["ValueError", "SystemExit", "KeyboardInterrupt"])
async def test_whatever_the_model_raises_fails_its_item_alone(name: str) -> None:
    async with serving(user_models.Fickle) as service:
        answer = await ask(service, {"value": 1}, {"raise": name}, {"value": 3})
        one, bad, three = values(answer)
        assert (one, three) == (1, 3)
        assert isinstance(bad, ModelFailed)
        assert values(await ask(service, {"value": 4})) == [4]  # the thread lives


async def test_a_wrong_output_count_is_named_as_the_models_error() -> None:
    async with serving(user_models.WrongCount) as service:
        (error,) = values(await ask(service, [1.0]))
    assert isinstance(error, ModelBroken)
    assert "3 outputs for a batch of 1" in error.message


async def test_an_output_that_is_not_finite_fails_its_item_alone() -> None:
    async with serving(user_models.Fickle) as service:
        good, bad = values(await ask(service, {"value": 1}, {"value": "nan"}))
    assert good == 1
    assert isinstance(bad, ModelBroken)


async def test_out_of_memory_is_split_and_lowers_the_limit() -> None:
    async with serving(user_models.Fickle) as service:
        items = [{"value": i, "raise": "MemoryError"} for i in range(8)]
        assert values(await ask(service, *items)) == list(range(8))
        assert service.stats()["limits"]["max_batch_cost"] == 3.0  # 4 failed, 2 fitted
        assert service.stats()["memory"]["out_of_memory"] == 1


async def test_a_cancelled_request_leaves_nothing_behind() -> None:
    async with serving(user_models.Fickle, Limits(max_batch_size=1)) as service:
        first = asyncio.ensure_future(ask(service, {"sleep_ms": 400}))
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(ask(service, {"value": 1}))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await first
        stats = service.stats()
    assert stats["queue"]["items"] == stats["in_flight"] == 0
    assert stats["totals"]["cancelled"] == 1


async def test_a_draining_replica_finishes_its_work_and_refuses_more() -> None:
    async with serving(user_models.Fickle) as service:
        first = asyncio.ensure_future(ask(service, {"value": 1, "sleep_ms": 30}))
        await asyncio.sleep(0.01)
        service.drain()
        assert not service.is_ready()
        with pytest.raises(Draining):
            await ask(service, {"value": 2})
        assert values(await first) == [1]


async def test_two_instances_run_side_by_side() -> None:
    async with serving(user_models.Fickle, Limits(max_batch_size=1, slots=2)) as service:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.gather(*(ask(service, {"sleep_ms": 100}) for _ in range(2)))
        assert loop.time() - started < 0.18


async def test_a_model_that_hangs_is_reported_by_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.runtime.service.HANG_AFTER_S", 0.05)
    async with serving(user_models.Fickle) as service:
        service.check_health()
        hung = asyncio.ensure_future(ask(service, {"sleep_ms": 1000}))
        said = ""
        while not said and not hung.done():  # on a busy machine the model begins late
            await asyncio.sleep(0.01)
            try:
                service.check_health()
            except RuntimeError as error:
                said = str(error)
        assert "running for" in said
        await hung
        service.check_health()


@pytest.mark.parametrize(
    "limits", [Limits(max_queue_items=4, max_items_per_request=4), Limits(max_queue_cost=8.0)]
)
async def test_a_queue_smaller_than_a_batch_starts(limits: Limits) -> None:
    async with serving(user_models.Doubler, limits) as service:
        assert values(await ask(service, [1, 2, 3, 4])) == [[2, 4, 6, 8]]


async def test_a_deadline_holds_while_an_item_is_preprocessed() -> None:
    class Slow(user_models.Fickle):
        def preprocess(self, item: Any) -> Any:
            time.sleep(0.5)
            return item

    async with serving(Slow) as service:
        started = time.perf_counter()
        with pytest.raises(DeadlinePassed, match="100 ms"):
            await ask(service, {"value": 1}, timeout_ms=100.0)
        assert time.perf_counter() - started < 0.4
        assert service.batcher.scheduler.waiting.reserved == 0


async def test_a_device_that_is_lost_makes_the_replica_unhealthy() -> None:
    class Lost(user_models.Fickle):
        def forward(self, batch: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

    async with serving(Lost) as service:
        service.check_health()
        await ask(service, {"value": 1})
        with pytest.raises(RuntimeError, match="device"):
            service.check_health()
