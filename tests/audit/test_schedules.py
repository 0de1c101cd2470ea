"""Schedules are values: the same one gives the same order, and goes through JSON."""

import json

import pytest

from deployments.audit.schedules import Inside, Lockstep, Meet, Overlap, Schedule, from_json, to_json
from deployments.audit.turns import Turns


def order(schedule: Schedule, points: list[int]) -> str:
    """Which thread was at its pause, as digits, for threads of so many points."""
    turns = Turns(schedule)

    def call(count: int) -> None:
        for number in range(count):
            turns.pause(str(number))

    turns.run([lambda count=count: call(count) for count in points])  # type: ignore[misc]
    return "".join(str(point.thread) for point in turns.points)


def test_lockstep_goes_stride_by_stride_and_on_alone_when_the_other_is_done() -> None:
    assert order(Lockstep(1), [3, 3]) == "010101"
    assert order(Lockstep(2), [4, 2]) == "001100"
    assert order(Lockstep(1), [1, 4]) == "01111"


def test_inside_puts_whole_calls_into_pauses() -> None:
    assert order(Inside((2,)), [4, 3]) == "0011100"
    assert order(Inside((1, 2)), [2, 3, 2]) == "0112210"


def test_calls_meet_at_a_point_and_go_on_in_lockstep() -> None:
    assert order(Meet((2, 1)), [4, 3]) == "0010101"
    assert order(Meet((1, 3)), [2, 4]) == "011101"
    assert order(Meet((2, 9)), [3, 2]) == "00110"


def test_a_pause_that_is_never_reached_puts_one_call_behind_the_other() -> None:
    assert order(Inside((9,)), [2, 2]) == "0011"


def test_overlap_is_the_same_for_the_same_seed_and_another_for_others() -> None:
    orders = {order(Overlap(seed, 0.5), [6, 6]) for seed in range(8)}
    assert len(orders) > 4
    assert order(Overlap(3, 0.5), [6, 6]) == order(Overlap(3, 0.5), [6, 6])


@pytest.mark.parametrize("schedule", [Lockstep(3), Inside((1, 5)), Meet((2, 4)), Overlap(7, 0.2)])
def test_schedules_go_through_json(schedule: Schedule) -> None:
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule


@pytest.mark.parametrize("value", [{}, {"kind": "none"}, {"kind": "lockstep"}, {"kind": "inside", "x": 1}])
def test_what_is_no_schedule_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        from_json(value)
