"""The batcher on a virtual clock: no sleep, no thread, no port."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deployments.core.batcher import Batcher, BatchReport
from deployments.core.contract import Limits
from deployments.core.errors import DeadlinePassed, Draining, InvalidItem, Overloaded, RequestTooLarge
from deployments.core.scheduler import Scheduler
from deployments.core.submission import Batch, Example, Result, Submission
from tests.core.virtual_time import run

Begins = Callable[[], None]
Done = Callable[[BatchReport], None]


class EchoExecutor:
    """Answers each item with its own value after `batch_s(cost)` seconds."""

    def __init__(self, batch_s: Callable[[float], float] = lambda cost: 0.1, lead_s: float = 0.0) -> None:
        self.batches: list[list[object]] = []
        self.started_at: list[float] = []
        self.staged: list[list[object]] = []
        self.unstaged = self.backlogs = 0
        self._batch_s = batch_s
        self._lead_s = lead_s

    async def execute(self, batch: Batch, on_begins: Begins, on_done: Done) -> BatchReport:
        on_begins()
        self.batches.append([item.example.value for item in batch.items])
        self.started_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self._batch_s(batch.cost))
        report = BatchReport([Result(output=item.example.value) for item in batch.items])
        on_done(report)
        return report

    def stage_lead_s(self) -> float:
        return self._lead_s

    async def stage(self, batch: Batch) -> None:
        self.staged.append([item.example.value for item in batch.items])

    def unstage(self, batch: Batch) -> None:
        self.unstaged += 1

    def on_backlog(self) -> None:
        self.backlogs += 1


def make(limits: Limits, executor: EchoExecutor | None = None) -> tuple[Batcher, EchoExecutor]:
    executor = executor or EchoExecutor()
    loop = asyncio.get_running_loop()
    return Batcher(Scheduler(limits), executor, clock=loop.time), executor


async def ask(batcher: Batcher, *values: object, timeout_s: float = 30.0, **more: int) -> list[object]:
    submission = await batcher.submit([Example(v) for v in values], timeout_s=timeout_s, **more)
    return outputs(submission)


def outputs(submission: Submission) -> list[object]:
    return [r.error or r.output for r in submission.results if r is not None]


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def wrapped() -> None:
        run(test())  # type: ignore[arg-type]

    wrapped.__name__ = test.__name__
    return wrapped


@virtual
async def test_a_lone_item_starts_at_once() -> None:
    batcher, executor = make(Limits())
    assert await ask(batcher, "a") == ["a"]
    assert executor.started_at == [0.0]


@virtual
async def test_membership_is_fixed_when_the_slot_is_free_not_earlier() -> None:
    batcher, executor = make(Limits(max_batch_size=4))
    first = asyncio.ensure_future(ask(batcher, 0))
    await asyncio.sleep(0.01)
    early = [asyncio.ensure_future(ask(batcher, i)) for i in (1, 2)]
    await asyncio.sleep(0.08)
    late = asyncio.ensure_future(ask(batcher, 3))  # 10 ms before the slot is free
    await asyncio.gather(first, *early, late)
    assert executor.batches == [[0], [1, 2, 3]]


@virtual
async def test_an_idle_slot_waits_for_company_only_when_asked_to() -> None:
    batcher, executor = make(Limits(max_batch_size=2, batch_wait_ms=50.0))
    await asyncio.gather(ask(batcher, 0))
    assert executor.started_at == [0.05]
    await asyncio.gather(ask(batcher, 1), ask(batcher, 2))  # full: no more wait
    assert executor.started_at[1] == pytest.approx(0.15)


@virtual
async def test_a_list_longer_than_a_batch_comes_back_in_order() -> None:
    batcher, executor = make(Limits(max_batch_size=4))
    assert await ask(batcher, *range(10)) == list(range(10))
    assert [len(b) for b in executor.batches] == [4, 4, 2]


@virtual
async def test_a_long_list_shares_its_batches_with_single_items() -> None:
    batcher, _executor = make(Limits(max_batch_size=4))
    long = asyncio.ensure_future(ask(batcher, *range(100)))
    await asyncio.sleep(0.05)
    singles = [asyncio.ensure_future(ask(batcher, f"s{i}")) for i in range(2)]
    await asyncio.gather(*singles)
    assert asyncio.get_running_loop().time() <= 0.31  # within the next two batches, not after 25
    await long


@virtual
async def test_single_items_do_not_starve_a_long_list() -> None:
    batcher, _ = make(Limits(max_batch_size=4))
    long = asyncio.ensure_future(ask(batcher, *range(40)))

    async def stream() -> None:
        while not long.done():
            task = asyncio.ensure_future(ask(batcher, "s"))
            await asyncio.sleep(0.026)  # nearly all of the capacity
            tasks.append(task)

    tasks: list[asyncio.Task[list[object]]] = []
    await stream()
    assert asyncio.get_running_loop().time() < 12.0
    await asyncio.gather(*tasks)


@virtual
async def test_lower_priority_numbers_go_first() -> None:
    batcher, executor = make(Limits(max_batch_size=1))
    asks = [ask(batcher, "first"), ask(batcher, "low", priority=5), ask(batcher, "high", priority=-5)]
    await asyncio.gather(*asks)
    assert executor.batches == [["first"], ["high"], ["low"]]


@virtual
async def test_low_priority_is_not_starved() -> None:
    batcher, _ = make(Limits(max_batch_size=1))
    low = asyncio.ensure_future(ask(batcher, "low", priority=1))
    blocker = asyncio.ensure_future(ask(batcher, *range(200)))
    assert await low == ["low"]
    assert asyncio.get_running_loop().time() < 12.0
    blocker.cancel()


@virtual
async def test_cost_bounds_a_batch_and_too_big_an_item_is_refused_at_the_door() -> None:
    batcher, executor = make(Limits(max_batch_size=8, max_batch_cost=10.0))
    examples = [Example("a", cost=6.0), Example("big", cost=11.0), Example("b", cost=6.0)]
    submission = await batcher.submit(examples, timeout_s=9.0)
    a, big, b = outputs(submission)
    assert (a, b) == ("a", "b")
    assert isinstance(big, InvalidItem)
    assert executor.batches == [["a"], ["b"]]


@virtual
async def test_a_request_of_only_too_big_items_is_answered() -> None:
    batcher, _ = make(Limits(max_batch_cost=10.0))
    submission = await batcher.submit([Example("big", cost=11.0)], timeout_s=9.0)
    assert isinstance(outputs(submission)[0], InvalidItem)
    assert len(batcher.scheduler.waiting) == 0


@virtual
async def test_examples_of_different_keys_never_share_a_batch() -> None:
    batcher, executor = make(Limits(max_batch_size=8))
    examples = [Example(i, key=i % 2) for i in range(4)]
    await batcher.submit(examples, timeout_s=9.0)
    assert executor.batches == [[0, 2], [1, 3]]


@virtual
async def test_what_has_not_begun_by_its_deadline_is_expired() -> None:
    batcher, executor = make(Limits(max_batch_size=1), EchoExecutor(lambda cost: 1.0))
    first = asyncio.ensure_future(ask(batcher, "first"))
    late = asyncio.ensure_future(ask(batcher, "late", timeout_s=0.5))
    (error,) = await late
    assert isinstance(error, DeadlinePassed)
    assert asyncio.get_running_loop().time() == pytest.approx(0.5)  # at once, not when a slot is free
    await first
    assert executor.batches == [["first"]]


@virtual
async def test_an_idle_server_begins_work_that_takes_longer_than_its_deadline() -> None:
    batcher, _ = make(Limits(), EchoExecutor(lambda cost: 1.0))
    assert await ask(batcher, "a", timeout_s=0.5) == ["a"]
    assert await ask(batcher, "b", timeout_s=0.5) == ["b"]  # also once that is known


@virtual
async def test_a_cancelled_item_leaves_the_queue() -> None:
    batcher, executor = make(Limits(max_batch_size=1))
    first = asyncio.ensure_future(ask(batcher, "first"))
    gone = asyncio.ensure_future(ask(batcher, "gone"))
    stays = asyncio.ensure_future(ask(batcher, "stays"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(first, stays)
    assert executor.batches == [["first"], ["stays"]]
    assert len(batcher.scheduler.waiting) == 0


@virtual
async def test_the_queue_is_bounded_and_a_list_is_taken_whole_or_not_at_all() -> None:
    batcher, executor = make(Limits(max_batch_size=1, max_queue_items=3))
    first = asyncio.ensure_future(ask(batcher, "first"))
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(ask(batcher, 1, 2))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refusal:
        await ask(batcher, 3, 4)
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s >= 1
    with pytest.raises(RequestTooLarge):
        await ask(batcher, *range(4))
    await asyncio.gather(first, waiting)
    assert executor.batches == [["first"], [1], [2]]


@virtual
async def test_a_deadline_that_the_queue_can_not_meet_is_refused_at_the_door() -> None:
    batcher, _ = make(Limits(max_batch_size=1), EchoExecutor(lambda cost: 1.0))
    await ask(batcher, "measure")
    busy = [asyncio.ensure_future(ask(batcher, i)) for i in range(5)]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded):
        await ask(batcher, "late", timeout_s=2.0)
    await asyncio.gather(*busy)


@virtual
async def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    batcher, _executor = make(Limits(max_batch_size=1))
    accepted = [asyncio.ensure_future(ask(batcher, i)) for i in range(3)]
    await asyncio.sleep(0)
    batcher.drain()
    with pytest.raises(Draining):
        await ask(batcher, "new")
    assert await asyncio.gather(*accepted) == [[0], [1], [2]]


@virtual
async def test_an_executor_that_raises_fails_its_batch_and_nothing_else() -> None:
    class Broken(EchoExecutor):
        async def execute(self, batch: Batch, on_begins: Begins, on_done: Done) -> BatchReport:
            if batch.items[0].example.value == "bad":
                raise RuntimeError("no")
            return await super().execute(batch, on_begins, on_done)

    batcher, _ = make(Limits(max_batch_size=1), Broken())
    bad, good = await asyncio.gather(ask(batcher, "bad"), ask(batcher, "good"))
    assert bad[0].type == "internal_error"  # type: ignore[attr-defined]
    assert good == ["good"]


@virtual
async def test_memory_that_ran_out_lowers_the_limit_for_later_batches() -> None:
    class Small(EchoExecutor):
        async def execute(self, batch: Batch, on_begins: Begins, on_done: Done) -> BatchReport:
            report = await super().execute(batch, on_begins, lambda report: None)
            if len(batch.items) > 4:
                report.out_of_memory = [(0, len(batch.items))]
                report.fitted = [(0, len(batch.items) // 2)]
            on_done(report)
            return report

    batcher, executor = make(Limits(max_batch_size=8), Small())
    await ask(batcher, *range(40))
    assert [len(b) for b in executor.batches][:5] == [8, 6, 4, 4, 4]  # between what failed and fitted
    assert 4 <= batcher.scheduler.admission.max_batch_cost < 5


@virtual
async def test_two_slots_run_side_by_side() -> None:
    batcher, executor = make(Limits(max_batch_size=1, slots=2))
    await ask(batcher, *range(4))
    assert executor.started_at == pytest.approx([0.0, 0.0, 0.1, 0.1])


@virtual
async def test_a_batch_is_staged_shortly_before_its_slot_is_free_and_can_still_be_left() -> None:
    batcher, executor = make(Limits(max_batch_size=2), EchoExecutor(lead_s=0.02))
    await ask(batcher, "measure")
    running = asyncio.ensure_future(ask(batcher, "running"))
    await asyncio.sleep(0.01)
    gone = asyncio.ensure_future(ask(batcher, "gone"))
    stays = asyncio.ensure_future(ask(batcher, "stays"))
    await asyncio.sleep(0.06)
    assert executor.staged == []  # too early
    await asyncio.sleep(0.02)
    assert executor.staged == [["gone", "stays"]]
    gone.cancel()
    await asyncio.gather(running, stays)
    assert executor.batches[-1] == ["stays"]
    assert executor.unstaged == 1


@virtual
async def test_items_being_preprocessed_count_against_the_queue() -> None:
    batcher, _ = make(Limits(max_batch_size=1, max_queue_items=8))
    for _ in range(8):
        batcher.reserve(1, timeout_s=30.0)
    with pytest.raises(Overloaded):
        batcher.reserve(1, timeout_s=30.0)
    batcher.scheduler.release(8)
    batcher.reserve(8, timeout_s=30.0)


@virtual
async def test_figures_that_raise_do_not_hold_up_the_answers() -> None:
    class Raises:
        def on_batch(self, batch: Batch, report: BatchReport, queue_waits_s: object) -> None:
            raise RuntimeError

    batcher, _ = make(Limits())
    batcher.observer = Raises()
    assert await ask(batcher, "a") == ["a"]


@virtual
async def test_ended_requests_with_long_deadlines_are_forgotten() -> None:
    batcher, _ = make(Limits(max_batch_size=64))
    last = asyncio.ensure_future(ask(batcher, "waits", timeout_s=1e6))
    for _ in range(40):
        await asyncio.gather(*(ask(batcher, i, timeout_s=86_400.0) for i in range(50)))
    await last
    assert len(batcher.scheduler.waiting._deadlines) < 300


@virtual
async def test_high_priority_is_let_in_by_what_is_ahead_of_it() -> None:
    batcher, executor = make(Limits(max_batch_size=1, max_queue_s=0.35))
    await ask(batcher, "measure")
    low = [asyncio.ensure_future(ask(batcher, i, priority=5)) for i in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await ask(batcher, "low", priority=5)
    assert await ask(batcher, "high", priority=-5) == ["high"]
    await asyncio.gather(*low)
    assert executor.batches[2] == ["high"]


@virtual
async def test_a_failed_batch_gives_each_caller_an_error_of_its_own() -> None:
    class Broken(EchoExecutor):
        async def execute(self, batch: Batch, on_begins: Begins, on_done: Done) -> BatchReport:
            raise RuntimeError("no")

    batcher, _ = make(Limits(), Broken())
    a, b = await ask(batcher, 1, 2)
    assert a is not b
