"""The rules on the page of scheduler.py, one test each or more."""

import itertools
import math
from dataclasses import replace

import pytest

from deployments.core.errors import ContextLengthExceeded, DeadlinePassed, InvalidItem, Overloaded
from deployments.engine.blocks import BlockPool
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Sequence, State, Step
from tests.engine.drive import Drive, stream, walk, who
from tests.engine.toy import alone, chat

STEPWISE = EngineLimits(step_cost=4, lane_cost=4, slots=64, step_units=64, burst=1)
STREAMS = EngineLimits(step_cost=4, lane_cost=math.inf, slots=64, step_units=64, burst=1)
UNITS = 4


def llm(
    *, slots: int = 4, step_units: int = 64, blocks: int = 1000, shares: bool = True, step_s: float = 0.01
) -> Drive:
    limits = EngineLimits(
        step_cost=slots, lane_cost=slots, slots=slots, step_units=step_units, burst=step_units
    )
    return Drive(limits, BlockPool(blocks, UNITS, shares=shares), step_s=lambda _: step_s)


def of_key(step: Step) -> float:
    return 1.0 if step.key == "heavy" else 0.1


# -- rule 1: keys ------------------------------------------------------------------------------------


def test_a_step_holds_sequences_of_one_key() -> None:
    drive = Drive(STEPWISE, step_s=of_key)
    drive.submit(walk(5, key="a"), walk(5, key="b"), walk(5, key="a"))
    assert all(len({s.key for s in who(step)}) == 1 for step in drive.until_idle() if step.work)


def test_a_heavy_and_a_light_key_get_the_same_time() -> None:
    drive = Drive(STEPWISE, step_s=of_key)
    drive.submit(walk(key="heavy"), walk(key="light"))
    steps = drive.steps(500)
    heavy_s = sum(of_key(step) for step in steps if step.key == "heavy")
    assert heavy_s / drive.now == pytest.approx(0.5, abs=0.05)


def test_a_light_key_never_waits_for_two_heavy_steps() -> None:
    drive = Drive(STEPWISE, step_s=of_key)
    drive.submit(walk(key="heavy"), walk(key="light"))
    keys = [step.key for step in drive.steps(500)][10:]
    assert ("heavy", "heavy") not in set(itertools.pairwise(keys))


def test_a_key_that_was_alone_owes_nothing_to_one_that_comes() -> None:
    drive = Drive(STEPWISE, step_s=of_key)
    drive.submit(walk(key="heavy"))
    drive.steps(100)
    drive.submit(walk(key="light"))
    assert "heavy" in [step.key for step in drive.steps(25)]


def test_a_key_owes_nothing_for_time_that_a_blocked_key_could_not_use() -> None:
    """All slots are taken by one key; who waits behind another can't complain about its steps later."""
    limits = EngineLimits(step_cost=2, lane_cost=2, slots=2, step_units=8, burst=1)
    drive = Drive(limits, step_s=lambda _: 1.0)
    first = walk(50, key="a")
    drive.submit(first, walk(key="a"))
    drive.step()
    drive.submit(walk(key="b"))
    drive.steps(60)  # b has waited 49 s for a slot
    assert first.state is State.ENDED
    assert [step.key for step in drive.steps(20)].count("a") >= 8


# -- rule 2: who talks ---------------------------------------------------------------------------------


def test_more_than_a_step_holds_take_turns_and_none_is_left_out() -> None:
    drive = Drive(STREAMS, step_s=lambda _: 0.1)
    streams = [stream() for _ in range(10)]
    drive.submit(*streams)
    for one in streams:
        drive.engine.feed(one, 100)
    steps = drive.steps(50)
    assert all(len(step.work) == 4 for step in steps[1:])
    counts = [sum(one in who(step) for step in steps) for one in streams]
    assert max(counts) - min(counts) <= 1


def test_a_stream_that_comes_while_every_step_is_full_begins_all_the_same() -> None:
    drive = Drive(STREAMS, step_s=lambda _: 0.1)
    busy = [stream() for _ in range(8)]
    drive.submit(*busy)
    for one in busy:
        drive.engine.feed(one, 1000)
    drive.steps(5)
    late = stream()
    drive.submit(late)
    drive.engine.feed(late, 10)
    assert any(late in who(step) for step in drive.steps(4))


def test_a_heavy_sequence_is_not_passed_for_ever_by_light_ones() -> None:
    limits = EngineLimits(step_cost=4, lane_cost=math.inf, slots=64, step_units=64, burst=1)
    drive = Drive(limits, step_s=lambda _: 0.1)
    heavy = walk(cost=4)
    drive.submit(*(walk() for _ in range(6)), heavy)
    steps = drive.steps(40)
    assert sum(heavy in who(step) for step in steps) >= 10


def test_costs_below_one_let_more_share_a_step() -> None:
    limits = EngineLimits(step_cost=4, lane_cost=4, slots=64, step_units=64, burst=1)
    drive = Drive(limits, step_s=lambda _: 0.1)
    drive.submit(*(walk(cost=0.25) for _ in range(20)))
    assert [len(step.work) for step in drive.steps(3)][-1] == 16


def test_a_held_sequence_sits_out_and_goes_on_where_it_was() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 0.1)
    held, other = walk(), walk()
    drive.submit(held, other)
    drive.step()
    drive.engine.hold(held, True)
    assert all(who(step) == [other] for step in drive.steps(3))
    drive.engine.hold(held, False)
    assert held in who(drive.step())


def test_held_sequences_keep_nobody_out() -> None:
    """Four slow readers of a model whose steps hold four: who comes then is served."""
    drive = Drive(STEPWISE, step_s=lambda _: 0.1)
    held = [walk() for _ in range(4)]
    drive.submit(*held)
    drive.step()
    for one in held:
        drive.engine.hold(one, True)
    late = walk(3)
    drive.submit(late)
    drive.steps(3)
    assert late.state is State.ENDED
    for one in held:
        drive.engine.hold(one, False)
    assert len(drive.step().work) == 4


def test_after_held_ones_are_back_a_step_is_still_bounded() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 0.1)
    early, late = [walk() for _ in range(4)], [walk() for _ in range(4)]
    drive.submit(*early)
    drive.step()
    for one in early:
        drive.engine.hold(one, True)
    drive.submit(*late)
    drive.step()
    for one in early:
        drive.engine.hold(one, False)
    steps = drive.steps(10)
    assert all(len(step.work) == 4 for step in steps)
    assert {id(one) for step in steps for one in who(step)} == {id(one) for one in early + late}


# -- rule 3: prompts -----------------------------------------------------------------------------------


def test_who_talks_goes_before_a_prompt() -> None:
    drive = llm()
    talker, long = chat([1, 2], 200), chat([1] * 300, 5)
    drive.submit(talker)
    drive.step()
    drive.submit(long)
    for step in drive.steps(20):
        assert [work.count for work in step.work if work.sequence is talker] == [1]
        assert step.work[0].sequence is talker


def test_no_step_has_more_units_than_its_budget() -> None:
    drive = llm(slots=8, step_units=20)
    drive.submit(*(chat([i % 7] * 50, 20) for i in range(8)))
    steps = drive.until_idle()
    assert max(step.units for step in steps) == 20


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    drive = llm(step_units=64)
    drive.submit(chat([1] * 130, 1))
    assert [step.units for step in drive.until_idle() if step.work] == [64, 64, 2]


def test_the_oldest_prompt_is_finished_first() -> None:
    drive = llm(slots=4, step_units=10)
    first, second = chat([1] * 30, 1), chat([2] * 30, 1)
    drive.submit(first)
    drive.submit(second)
    steps = drive.until_idle()
    assert [who(step)[0] is first for step in steps[:6]] == [True, True, True, False, False, False]


@pytest.mark.parametrize("unit_s", [0.0002, 0.001, 0.005])
def test_a_long_prompt_stalls_those_that_talk_by_less_than_three_times(unit_s: float) -> None:
    """On three machines: what a chunk costs is learned, not assumed."""
    drive = Drive(
        EngineLimits(step_cost=16, lane_cost=16, slots=16, step_units=256, burst=256),
        BlockPool(30_000, UNITS, shares=True),
        step_s=lambda step: 0.02 + unit_s * step.units,
    )
    drive.submit(*(chat([i % 7, i], 10_000) for i in range(8)))
    drive.steps(50)
    plain_s = 0.02 + unit_s * 8
    for token in (3, 4):  # the second meets what was learned from the first
        long = chat([token] * 1500, 1)
        drive.submit(long)
        gaps = []
        while long.state is not State.ENDED:
            began = drive.now
            step = drive.step()
            assert len(step.work) >= 8
            gaps.append(drive.now - began)
    assert max(gaps[1:]) <= 3.0 * plain_s


# -- rule 4: newcomers -----------------------------------------------------------------------------------


def started(drive: Drive, sequences: list[Sequence]) -> list[Sequence]:
    drive.until_idle()
    return sorted(sequences, key=lambda sequence: (sequence.began, sequence.serial))


def test_the_best_priority_gets_the_next_slot_then_who_came_first() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1)
    drive = Drive(limits, step_s=lambda _: 0.001)
    low, first, second, high = walk(2, priority=5), walk(2), walk(2), walk(2, priority=-5)
    drive.submit(low, first, second, high)
    assert started(drive, [low, first, second, high]) == [high, first, second, low]


def test_waiting_improves_the_rank_so_nobody_starves() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1)
    drive = Drive(limits, step_s=lambda _: 1.0)
    low = walk(1, priority=3)
    drive.submit(low)
    for _ in range(30):  # always a better one at the door
        drive.submit(walk(1, priority=0))
        drive.step()
    assert low.began is not None
    assert low.began <= 16.0


def test_nobody_overtakes_one_who_only_lacks_memory() -> None:
    drive = llm(blocks=12)
    running = chat([1] * 20, 8)
    drive.submit(running)
    drive.step()
    big, small = chat([2] * 36, 4), chat([3], 2)
    drive.submit(big)
    drive.submit(small)
    drive.until_idle()
    assert big.began is not None
    assert small.began is not None
    assert big.began <= small.began


def test_a_newcomer_leaves_a_spare_block_for_each_that_runs() -> None:
    drive = llm(blocks=4)
    first = chat([1] * 7, 5)  # two blocks now, a third soon
    drive.submit(first)
    drive.step()
    second = chat([2] * 7, 5)
    drive.submit(second)  # its two blocks are free, but then the first could not grow
    drive.step()
    assert second.state is State.WAITING
    drive.until_idle()
    assert drive.engine.scheduler.preemptions == 0
    assert second.state is State.ENDED


def test_a_group_is_queued_whole_or_not_at_all() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1, max_waiting=3)
    drive = Drive(limits, step_s=lambda _: 1.0)
    drive.submit(walk(), walk())
    group = [walk() for _ in range(3)]
    with pytest.raises(Overloaded):
        drive.submit(*group)
    assert {one.state for one in group} == {State.NEW}
    assert drive.engine.waiting == 2
    assert drive.engine.counters.refused == 3


def test_places_that_a_key_has_no_use_for_are_no_room_in_the_queue() -> None:
    """64 slots, but only four may step: the fifth waits, and of those only two may."""
    drive = Drive(
        EngineLimits(step_cost=4, lane_cost=4, slots=64, step_units=64, burst=1, max_waiting=2),
        step_s=lambda _: 1.0,
    )
    drive.submit(*(walk() for _ in range(4)))
    drive.step()
    drive.submit(walk(), walk())
    with pytest.raises(Overloaded):
        drive.submit(walk())
    drive.step()
    with pytest.raises(Overloaded):
        drive.submit(walk())


def test_a_predicted_wait_over_the_deadline_is_refused_at_the_door() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    for _ in range(40):
        drive.submit(walk(10))
    drive.steps(60)  # four begin every 10 s
    waiting = drive.engine.waiting
    assert drive.engine.predicted_wait_s() == pytest.approx(2.5 * waiting, rel=0.5)
    with pytest.raises(Overloaded):
        drive.submit(walk(deadline=drive.now + 1.0))
    drive.submit(walk(deadline=drive.now + 1000.0))


@pytest.mark.parametrize("why", ["all began", "all left"])
def test_a_quiet_hour_is_not_mistaken_for_a_slow_queue(why: str) -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    first = [walk(2) for _ in range(6)]
    drive.submit(*first)
    drive.step()
    if why == "all left":
        for one in first:
            drive.engine.cancel(one)
    drive.until_idle()
    drive.now += 3600.0
    drive.submit(*(walk(2) for _ in range(6)))
    drive.step()
    assert drive.engine.predicted_wait_s() < 60.0


def test_an_hour_before_the_queue_formed_is_not_mistaken_for_a_slow_queue() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    long = [walk(10) for _ in range(4)]
    drive.submit(*long)
    drive.step()
    drive.now += 3600.0  # a step that took an hour
    drive.submit(*(walk(10) for _ in range(8)))
    drive.steps(12)
    assert drive.engine.predicted_wait_s() < 60.0


# -- deadlines ---------------------------------------------------------------------------------------


def test_who_has_not_begun_by_its_deadline_ends_with_an_error() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1)
    drive = Drive(limits, step_s=lambda _: 1.0)
    drive.submit(walk())
    late = walk(deadline=2.5)
    drive.submit(late)
    drive.steps(2)
    assert drive.engine.next_deadline() == 2.5
    drive.steps(2)
    assert drive.engine.take_ended() == [late]
    assert isinstance(late.error, DeadlinePassed)
    assert drive.engine.waiting == 0


def test_a_request_is_in_time_once_one_of_its_sequences_has_begun() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1)
    drive = Drive(limits, step_s=lambda _: 1.0)
    group = [walk(4, deadline=2.5) for _ in range(3)]
    late = [walk(4, deadline=2.5) for _ in range(2)]
    drive.submit(*group)
    drive.submit(*late)
    drive.until_idle()
    assert [one.error for one in group] == [None] * 3
    assert all(isinstance(one.error, DeadlinePassed) for one in late)


def test_the_door_asks_when_a_request_would_begin_not_when_its_last_sequence_would() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    for _ in range(12):
        drive.submit(walk(10))
    drive.until_idle()  # it has learned: four begin every 10 s
    drive.submit(*(walk(10, deadline=drive.now + 5.0) for _ in range(20)))
    assert drive.engine.waiting == 20


def test_a_deadline_that_passed_on_the_way_here_is_a_deadline_not_an_overload() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    drive.now = 5.0
    late = walk(deadline=4.0)
    drive.submit(late)
    assert drive.engine.plan(drive.now) is None
    assert isinstance(late.error, DeadlinePassed)


def test_who_began_and_was_preempted_has_no_deadline_any_more() -> None:
    drive = llm(blocks=4, slots=2)
    first, second = chat([1] * 3, 12), chat([2] * 3, 12, deadline=0.02)
    drive.submit(first, second)
    drive.until_idle()
    assert second.preemptions > 0
    assert second.error is None
    assert second.payload["given"] == alone([2] * 3, 12)


# -- rule 5: preemption --------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False])
def test_the_worst_rank_gives_way_comes_back_first_and_loses_no_token(shares: bool) -> None:
    drive = llm(blocks=8, slots=3, shares=shares)
    best, worst = chat([1] * 8, 20, priority=-5), chat([2] * 8, 20, priority=0)
    drive.submit(best, worst)
    drive.step()
    waiting = chat([3] * 2, 2)
    drive.submit(waiting)
    while worst.state is not State.WAITING:
        drive.step()
    assert best.state is State.RUNNING
    given = len(worst.payload["given"])
    assert given > 0
    assert drive.engine.scheduler.turns.lanes[""].next(drive.now) is worst
    drive.until_idle()
    assert best.preemptions == 0
    assert worst.payload["given"] == alone([2] * 8, 20)
    assert best.payload["given"] == alone([1] * 8, 20)
    assert waiting.state is State.ENDED


def test_a_preempted_sequence_finds_its_blocks_in_the_cache() -> None:
    drive = llm(blocks=10, slots=2)
    drive.submit(chat([1] * 8, 16), chat([2] * 12, 16, priority=1))
    steps = drive.until_idle()
    assert drive.engine.scheduler.preemptions > 0
    assert drive.engine.counters.units < 2 * (8 + 12 + 32), [step.units for step in steps]


# -- rule 6: what never fits ---------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [4.5, math.inf, math.nan])
def test_a_cost_that_no_step_holds_is_refused_at_the_door(cost: float) -> None:
    with pytest.raises(InvalidItem, match="max_sequences"):
        Engine(STEPWISE).submit([walk(cost=cost)], 0.0)


def test_more_tokens_than_the_memory_holds_are_refused_at_the_door() -> None:
    drive = llm(blocks=4)
    with pytest.raises(ContextLengthExceeded, match="max_tokens"):
        drive.submit(chat([1] * 10, 7))
    drive.submit(chat([1] * 10, 6))
    drive.until_idle()


def test_what_fits_a_step_still_fits_when_smaller_batches_turned_out_to_be_useful() -> None:
    """Warm-up bounds the step at what is useful; one request may cost more than that, and runs alone."""
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    drive.engine.scheduler.limits = replace(STEPWISE, step_cost=2.0, lane_cost=2.0)
    heavy = walk(3, cost=4)
    drive.submit(walk(3), walk(3), heavy, walk(3))
    drive.until_idle()
    assert heavy.state is State.ENDED
    assert drive.engine.counters.finished == 4


# -- what leaves ---------------------------------------------------------------------------------------


def test_cancel_during_a_step_frees_the_slot_before_the_next() -> None:
    limits = EngineLimits(step_cost=1, lane_cost=1, slots=1, step_units=1, burst=1)
    drive = Drive(limits, step_s=lambda _: 1.0)
    first, second = walk(), walk()
    drive.submit(first, second)
    step = drive.engine.plan(0.0)
    assert step is not None
    drive.engine.cancel(first)
    drive.engine.commit(step, drive.runner.run(step), 1.0)
    following = drive.step()
    assert who(following) == [second]
    assert following.ended == [first]
    assert following.freed == [0]


def test_a_key_whose_last_sequence_leaves_during_its_step_is_forgotten() -> None:
    drive = Drive(STEPWISE, step_s=lambda _: 1.0)
    only = walk(key="gone")
    drive.submit(only)
    step = drive.engine.plan(0.0)
    assert step is not None
    drive.engine.cancel(only)
    drive.engine.commit(step, drive.runner.run(step), 1.0)
    assert not drive.engine.scheduler.turns.lanes
