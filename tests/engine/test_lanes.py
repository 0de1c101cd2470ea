"""Turns between keys: time is shared out evenly, and nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.lanes import Lane, Turns, rank
from deployments.engine.sequence import Sequence

STEP_S = st.floats(0.001, 5.0)


def busy(turns: Turns, key: str) -> Lane:
    """A lane that always has something to do."""
    lane = turns.lane(key)
    sequence = Sequence(key=key, known=10**9)
    lane.start(sequence)
    lane.refresh(sequence)
    return lane


def served(turns: Turns, step_s: dict[str, float], steps: int) -> list[str]:
    keys = []
    for _ in range(steps):
        lane = turns.in_order()[0]
        keys.append(str(lane.key))
        turns.charge(lane, step_s[keys[-1]])
    return keys


@settings(max_examples=30, deadline=None)
@given(st.lists(STEP_S, min_size=2, max_size=6))
def test_shares_of_time_converge_whatever_the_steps_take(times: list[float]) -> None:
    turns = Turns()
    step_s = {str(i): seconds for i, seconds in enumerate(times)}
    for key in step_s:
        busy(turns, key)
    # Until the slowest key had 30 turns.
    steps = int(30 * sum(max(times) / seconds + 1 for seconds in times))
    keys = served(turns, step_s, min(steps, 5_000))
    seconds = {key: keys.count(key) * step_s[key] for key in step_s}
    # Deficits differ by at most one round, that is two of the longest steps.
    assert max(seconds.values()) - min(seconds.values()) <= 3 * max(times)


@settings(max_examples=30, deadline=None)
@given(st.lists(STEP_S, min_size=2, max_size=6))
def test_no_key_waits_longer_than_two_rounds_of_the_longest_steps(times: list[float]) -> None:
    turns = Turns()
    step_s = {str(i): seconds for i, seconds in enumerate(times)}
    for key in step_s:
        busy(turns, key)
    keys = served(turns, step_s, 400)
    now, last = 0.0, dict.fromkeys(step_s, 0.0)
    for key in keys:
        assert now - last[key] <= 4 * len(times) * max(times)
        now += step_s[key]
        last[key] = now


def test_a_clock_that_stands_still_does_no_harm() -> None:
    turns = Turns()
    for key in "ab":
        busy(turns, key)
    keys = served(turns, {"a": 0.0, "b": 0.0}, 9_000)
    assert set(keys) == {"a", "b"}


def test_debts_are_bounded_by_the_longest_step() -> None:
    """A lane that runs because the one before it can't must not pay for it afterwards."""
    turns = Turns()
    blocked, worker = busy(turns, "blocked"), busy(turns, "worker")
    for _ in range(1000):
        turns.in_order()
        turns.charge(worker, 1.0)
    assert worker.deficit_s >= -1.0
    assert blocked.deficit_s <= 1.0


def test_an_empty_lane_is_forgotten() -> None:
    turns = Turns()
    lane = busy(turns, "a")
    lane.stop(next(iter(lane.running)))
    turns.charge(lane, 1.0)
    assert not turns.lanes


def test_an_idle_lane_takes_no_turn() -> None:
    turns = Turns()
    lane, other = busy(turns, "a"), busy(turns, "b")
    held = next(iter(lane.running))
    held.is_held = True
    lane.refresh(held)
    assert turns.in_order() == [other]


def test_a_held_sequence_counts_nothing_until_it_is_back() -> None:
    lane = Lane("")
    sequence = Sequence(known=1, cost=2.5)
    lane.start(sequence)
    lane.refresh(sequence)
    assert lane.running_cost == 2.5
    for is_held, cost in ((True, 0.0), (True, 0.0), (False, 2.5), (True, 0.0)):
        sequence.is_held = is_held
        lane.refresh(sequence)
        assert lane.running_cost == cost
    lane.stop(sequence)
    assert lane.running_cost == 0.0


def test_who_was_preempted_stands_before_who_waits() -> None:
    lane = Lane("")
    first, second = Sequence(serial=0), Sequence(serial=1)
    lane.wait(second)
    lane.wait(first, first=True)
    assert list(lane.waiting()) == [first, second]
    assert lane.next(0.0) is first


def test_five_seconds_of_waiting_are_worth_a_level_of_priority() -> None:
    old, new = Sequence(priority=1, serial=0, arrived=0.0), Sequence(priority=0, serial=1, arrived=4.9)
    assert rank(new, 4.9) < rank(old, 4.9)
    assert rank(old, 5.0) < rank(new, 5.0)


def test_costs_that_are_no_binary_fractions_leave_nothing_behind() -> None:
    lane = Lane("")
    sequences = [Sequence(cost=0.1) for _ in range(10)]
    for sequence in sequences:
        lane.start(sequence)
    assert lane.running_cost == pytest.approx(1.0)
    for sequence in sequences:
        lane.stop(sequence)
    assert lane.running_cost == 0.0
