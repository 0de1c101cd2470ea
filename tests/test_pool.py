"""Instances of a model in one replica: shared weights, growth, what happens to one that raised or hung."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from deployments.core.contract import Answer, Limits, RequestOptions
from deployments.core.errors import InvalidItem, ModelFailed
from deployments.runtime.adapter import Adapter
from deployments.runtime.copies import Weights
from deployments.runtime.digest import digest_of
from deployments.runtime.memory import BudgetError
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing

POOL = Sharing("pool", 3, is_whole=True)


class Noter:
    """Unsafe in every part: preprocess, forward and postprocess talk through the instance."""

    made: ClassVar[list["Noter"]] = []

    def load(self, device: str) -> None:
        self.net = torch.nn.Linear(4, 4).eval()
        self.net.register_buffer("steps", torch.zeros(1))
        self.table = torch.arange(10_000.0)
        self.stack: list[float] = []
        type(self).made.append(self)

    def preprocess(self, item: Any) -> torch.Tensor:
        if not isinstance(item, (int, float, dict)):
            raise ValueError("a number, please")
        self.asked = item
        return torch.tensor(float(item if not isinstance(item, dict) else item["value"]))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.stack.append(float(batch[0]))
        time.sleep(0.001)
        if isinstance(self.asked, dict):
            if "hang_s" in self.asked:
                time.sleep(self.asked["hang_s"])
            if "raise" in self.asked:
                raise RuntimeError("half way")
        self.scale = self.stack.pop()
        assert not self.stack, "what a call that raised had left behind"
        return batch * 2

    def postprocess(self, output: torch.Tensor) -> list[float]:
        return [float(output), self.scale]

    def examples(self) -> list[float]:
        return [1.0, 2.0]


@asynccontextmanager
async def serving(model: type, sharing: Sharing, **limits: Any) -> AsyncIterator[ModelService]:
    async def decide(first: Adapter) -> Sharing:
        return sharing

    limits = {"max_batch_size": 1, "slots": sharing.slots, **limits}
    service = ModelService("app", lambda: Adapter(model, {}), Limits(**limits))
    await service.start("cpu", decide=decide)
    try:
        yield service
    finally:
        service.close()


async def ask(service: ModelService, *items: Any) -> Answer:
    return await service.predict(items, RequestOptions())


async def answers(service: ModelService, *items: Any) -> list[Any]:
    return [o.error or o.value for o in (await ask(service, *items)).outcomes]


async def test_a_model_that_talks_through_itself_answers_right_in_a_pool() -> None:
    async with serving(Noter, POOL) as service:
        asked = [float(n) for n in range(300)]
        found = await asyncio.gather(*(answers(service, value) for value in asked))
        assert found == [[[2 * value, value]] for value in asked]
        assert service.stats()["slots"]["now"] == 3


async def test_the_same_model_shared_by_threads_answers_wrong() -> None:
    """Or the test above could not fail."""
    async with serving(Noter, Sharing("shared", 3)) as service:
        asked = [float(n) for n in range(300)]
        found = await asyncio.gather(*(answers(service, value) for value in asked))
        assert found != [[[2 * value, value]] for value in asked]


async def test_a_pool_grows_only_when_work_waits() -> None:
    async with serving(Noter, POOL) as service:
        for value in range(20):
            await answers(service, value)
        assert service.stats()["slots"]["now"] == 1
        await asyncio.gather(*(answers(service, value) for value in range(200)))
        assert service.stats()["slots"]["now"] > 1


async def test_a_bad_item_costs_no_instance() -> None:
    async with serving(Noter, POOL) as service:
        (bad,) = await answers(service, "text")
        assert isinstance(bad, InvalidItem)
        assert service.stats()["slots"]["renewed"] == 0


@pytest.mark.parametrize("sharing", [POOL, Sharing("exclusive", 1, is_whole=True, in_order=True)])
async def test_an_instance_that_raised_is_replaced(sharing: Sharing) -> None:
    async with serving(Noter, sharing) as service:
        found = await asyncio.gather(
            *(answers(service, {"value": 1, "raise": True} if n == 5 else float(n)) for n in range(30))
        )
        assert isinstance(found[5][0], ModelFailed)
        assert [one for n, one in enumerate(found) if n != 5] == [
            [[2.0 * n, float(n)]] for n in range(30) if n != 5
        ]
        service.check_health()


async def test_an_instance_that_hangs_is_given_up_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.runtime.service.HANG_AFTER_S", 0.3)
    monkeypatch.setattr("deployments.runtime.service.GAUGE_EVERY_S", 0.05)
    async with serving(Noter, POOL) as service:
        hung = asyncio.ensure_future(answers(service, {"value": 1, "hang_s": 3.0}))
        found = await asyncio.gather(*(answers(service, float(n)) for n in range(50)))
        assert found == [[[2.0 * n, float(n)]] for n in range(50)]
        (error,) = await hung
        assert isinstance(error, ModelFailed)
        assert "no answer" in error.message
        service.check_health()
        assert await answers(service, 7.0) == [[14.0, 7.0]]


async def test_exclusive_keeps_the_order_of_arrival() -> None:
    seen: list[float] = []

    class Ordered(Noter):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(float(batch[0]))
            return super().forward(batch)

    async with serving(Ordered, Sharing("exclusive", 1, is_whole=True, in_order=True)) as service:
        seen.clear()
        lists = [asyncio.ensure_future(ask(service, *range(10 * n, 10 * n + 10))) for n in range(3)]
        late = service.predict([99.0], RequestOptions(priority=-10))
        await asyncio.gather(*lists, late)
    assert seen == [*map(float, range(30)), 99.0]


def test_copies_share_what_is_never_written_and_own_their_buffers() -> None:
    torch.manual_seed(0)
    first = Noter()
    first.load("cpu")
    weights = Weights(first)
    torch.manual_seed(1)
    copy = Noter()
    copy.load("cpu")
    tied = weights.tie(copy)
    assert torch.equal(copy.net.weight, first.net.weight)
    assert copy.net.weight.data_ptr() == first.net.weight.data_ptr()
    assert copy.table.data_ptr() == first.table.data_ptr()
    assert copy.net.steps.data_ptr() != first.net.steps.data_ptr()
    assert not tied.is_written
    copy.net.steps.add_(1)
    assert not tied.is_written
    assert float(first.net.steps) == 0
    with torch.inference_mode():
        copy.table.mul_(2)
    assert tied.is_written


def test_scratch_memory_that_the_first_has_written_is_not_shared() -> None:
    first, copy = Noter(), Noter()
    first.load("cpu")
    weights = Weights(first)
    first.table.zero_()
    copy.load("cpu")
    weights.tie(copy)
    assert copy.table.data_ptr() != first.table.data_ptr()


async def test_a_model_that_writes_to_its_weights_soon_shares_none() -> None:
    class Sly(Noter):
        calls: ClassVar[int] = 0

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            if type(self).calls > 20:
                self.net.weight.data.add_(0)  # type: ignore[operator]
                self.table.add_(1).sub_(1)
            return super().forward(batch)

    async with serving(Sly, POOL) as service:
        found = await asyncio.gather(*(answers(service, float(n)) for n in range(200)))
        assert found == [[[2.0 * n, float(n)]] for n in range(200)]
        slots = service._executor._slots
        assert len(slots) > 1
        await asyncio.gather(*(answers(service, float(n)) for n in range(100)))
        tables = {slot.instance.model.table.data_ptr() for slot in slots if slot.instance is not None}
        assert len(tables) == len(slots)


def test_a_digest_tells_weights_apart_and_not_instances() -> None:
    def digest(seed: int) -> str:
        torch.manual_seed(seed)
        one = Noter()
        one.load("cpu")
        return digest_of(one)

    assert digest(0) == digest(0) != digest(1)


async def test_a_budget_below_the_loaded_model_says_so() -> None:
    with pytest.raises(BudgetError, match="memory: 50 MiB are less than"):
        async with serving(Noter, POOL, memory=50 * 2**20):
            pass


async def test_a_budget_is_changed_in_place_and_bounds_what_comes_next() -> None:
    class Roomy(Noter):
        def preprocess(self, item: Any) -> torch.Tensor:
            return torch.tensor(float(item))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            torch.ones(len(batch), 2**20)  # 4 MiB an item
            return batch * 2

        def postprocess(self, output: torch.Tensor) -> float:
            return float(output)

    async with serving(Roomy, Sharing("exclusive", 1), max_batch_size=32) as service:
        free = service.stats()["memory"]["learned_max_cost"]
        assert free is None or free > 32
        room = service.stats()["memory"]["used_bytes"] + 48 * 2**20
        service.change_limits(replace(service.limits, memory=room))
        assert service.stats()["memory"]["learned_max_cost"] < 16  # by what the first runs took an item
        found = await asyncio.gather(*(ask(service, *range(32)) for _ in range(4)))
        assert all([o.value for o in answer.outcomes] == [2.0 * n for n in range(32)] for answer in found)
        assert service.stats()["memory"]["budget_bytes"] == room


async def test_no_more_instances_than_the_budget_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Noter, POOL) as service:
        monkeypatch.setattr(service._budget, "used", lambda: service._budget.bytes + 1)
        await asyncio.gather(*(answers(service, float(n)) for n in range(100)))
        assert service.stats()["slots"]["now"] == 1


async def test_an_item_that_only_lacks_memory_beside_another_runs_when_it_is_alone() -> None:
    busy = threading.Semaphore(1)

    class Crowded(Noter):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if not busy.acquire(blocking=False):
                raise MemoryError
            try:
                time.sleep(0.002)
                return super().forward(batch)
            finally:
                busy.release()

    async with serving(Crowded, POOL) as service:
        found = await asyncio.gather(*(answers(service, float(n)) for n in range(60)))
        assert found == [[[2.0 * n, float(n)]] for n in range(60)]


# What a review found


class Sized:
    """Its postprocess reads what its preprocess noted: right as long as nothing comes in between."""

    def load(self, device: str) -> None: ...

    def preprocess(self, item: Any) -> torch.Tensor:
        if item == "key":
            raise KeyError("half way")
        self.size = len(item)
        return torch.tensor(item, dtype=torch.float32)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.sum(1)

    def postprocess(self, output: torch.Tensor) -> list[float]:
        return [float(output), self.size]

    def examples(self) -> list[list[float]]:
        return [[1.0, 1.0], [2.0, 1.0, 1.0]]


async def test_items_of_different_shapes_in_one_batch_keep_their_own_notes() -> None:
    async with serving(Sized, Sharing("exclusive", 1, is_whole=True), max_batch_size=8) as service:
        items = [[1.0] * (2 + n % 3) for n in range(8)]
        assert await answers(service, *items) == [[float(len(item)), len(item)] for item in items]


async def test_an_instance_whose_preprocess_raised_is_replaced() -> None:
    async with serving(Sized, Sharing("exclusive", 1, is_whole=True)) as service:
        (error,) = await answers(service, "key")
        assert isinstance(error, ModelFailed)
        assert await answers(service, [1.0, 1.0]) == [[2.0, 2]]
        assert service.stats()["slots"]["renewed"] == 1


async def test_a_bad_item_in_a_full_batch_costs_two_fresh_instances_at_most() -> None:
    Noter.made.clear()
    async with serving(Noter, Sharing("exclusive", 1, is_whole=True), max_batch_size=32) as service:
        before = len(Noter.made)
        items: list[Any] = [float(n) for n in range(31)]  # the last one's note is what forward reads
        found = await answers(service, *items, {"value": 1, "raise": True})
        assert isinstance(found[-1], ModelFailed)
        assert [one[0] for one in found[:-1]] == [2 * value for value in items]
        for _ in range(100):
            if service.stats()["slots"]["now"]:
                break
            await asyncio.sleep(0.02)
        assert len(Noter.made) - before <= 3


async def test_the_first_instances_writes_to_shared_weights_are_noticed() -> None:
    class FirstOnly(Noter):
        writes: ClassVar[bool] = False

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if self is FirstOnly.made[0] and FirstOnly.writes:
                self.table.add_(1).sub_(1)
            return super().forward(batch)

    FirstOnly.made = []
    async with serving(FirstOnly, POOL) as service:
        await asyncio.gather(*(answers(service, float(n)) for n in range(200)))
        assert service.stats()["slots"]["now"] > 1
        FirstOnly.writes = True
        await asyncio.gather(*(answers(service, float(n)) for n in range(200)))
        assert not service._executor._instances._ties


def test_views_and_lazy_layers_are_left_alone() -> None:
    class Views:
        def __init__(self) -> None:
            self.big = torch.arange(8.0)
            self.head = self.big[:2]
            self.net = torch.nn.Module()
            self.net.register_buffer("cache", torch.zeros(4))
            self.row = self.net.cache[:2]
            self.lazy = torch.nn.LazyLinear(3)

    first, copy = Views(), Views()
    Weights(first).tie(copy)
    first.row.fill_(7)
    assert copy.big.tolist() == list(range(8))
    assert copy.head.tolist() == [0, 1]
    assert copy.row.tolist() == [0, 0]
    assert copy.net.cache.tolist() == [0] * 4
    assert digest_of(first) != digest_of(copy)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_digest_sees_modes_and_scripts() -> None:
    def of(net: torch.nn.Module) -> str:
        return digest_of(_Holder(net))

    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    assert of(linear.train()) != of(linear.eval())

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Thrice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    assert of(torch.jit.script(Twice())) != of(torch.jit.script(Thrice()))


class _Holder:
    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net


async def test_a_hang_beside_an_item_that_waits_to_be_alone_freezes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.runtime.service.HANG_AFTER_S", 0.3)
    monkeypatch.setattr("deployments.runtime.service.GAUGE_EVERY_S", 0.05)
    hanging = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Both(Noter):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if isinstance(self.asked, dict) and "hang_s" in self.asked:
                loop.call_soon_threadsafe(hanging.set)
            if isinstance(self.asked, dict) and "oom" in self.asked and hanging.is_set():
                raise MemoryError
            return super().forward(batch)

    async with serving(Both, POOL) as service:
        await asyncio.gather(*(answers(service, float(n)) for n in range(100)))  # the pool has grown
        hung = asyncio.ensure_future(answers(service, {"value": 1, "hang_s": 2.0}))
        await hanging.wait()
        alone = asyncio.ensure_future(answers(service, {"value": 2, "oom": True}))
        (error,) = await asyncio.wait_for(hung, 20)
        assert isinstance(error, ModelFailed)
        (error,) = await asyncio.wait_for(alone, 20)
        assert isinstance(error, InvalidItem)
        assert await asyncio.wait_for(answers(service, 7.0), 20) == [[14.0, 7.0]]


async def test_a_pool_that_can_not_grow_does_not_try_at_each_batch() -> None:
    class Once(Noter):
        loads: ClassVar[int] = 0

        def load(self, device: str) -> None:
            type(self).loads += 1
            if type(self).loads > 1:
                raise OSError("no more weights")
            super().load(device)

    async with serving(Once, POOL) as service:
        await asyncio.gather(*(answers(service, float(n)) for n in range(200)))
        assert Once.loads <= 3
        service.check_health()
