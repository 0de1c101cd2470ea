"""A bound learned from batches that ran out of memory, in virtual time."""

import random

import pytest

from deployments.core.cost_limit import HOLD_S, CostLimit

FULL = 100.0


def drive(limit: CostLimit, room: float, batches: int, start: float = 0.0, step_s: float = 0.1) -> int:
    """Full batches of items of cost 1 to 5 against a device with `room`; how many ran out."""
    source, failures, now = random.Random(0), 0, start
    for _ in range(batches):
        now += step_s
        cost = 0.0
        while True:
            item = source.uniform(1.0, 5.0)
            if cost + item > min(FULL, limit.value):
                break
            cost += item
        if cost > room:
            failures += 1
            limit.on_out_of_memory(now, cost, cost / 2 if cost / 2 <= room else 0.0)
        else:
            limit.on_fitted(now, cost)
    return failures


@pytest.mark.parametrize("room", [9.0, 23.0, 50.0, 71.0, 95.0])
def test_the_bound_settles_close_below_what_fits_after_few_failures(room: float) -> None:
    limit = CostLimit()
    assert drive(limit, room, 100) <= 9
    assert 0.9 * room <= limit.value <= 1.1 * room
    assert drive(limit, room, 100, start=10.0) <= 3  # 10 s, before anything is forgotten


def test_without_a_failure_there_is_no_bound() -> None:
    limit = CostLimit()
    assert drive(limit, 1000.0, 50) == 0
    assert limit.value == float("inf")


def test_memory_that_shrinks_again_is_found_again() -> None:
    limit = CostLimit()
    drive(limit, 80.0, 100)
    assert drive(limit, 30.0, 100, start=10.0) <= 12
    assert 27.0 <= limit.value <= 33.0


def test_memory_that_comes_back_is_used_again_slowly() -> None:
    limit = CostLimit()
    drive(limit, 40.0, 100)
    low = limit.value
    drive(limit, 1000.0, 100, start=10.0)
    assert limit.value <= 1.2 * low  # not at once
    drive(limit, 1000.0, 100, start=20.0, step_s=HOLD_S / 3)
    assert limit.value > 0.95 * FULL


def test_doubts_that_were_wrong_come_ever_more_rarely() -> None:
    limit = CostLimit()
    drive(limit, 40.0, 100)
    an_hour = [drive(limit, 40.0, 1200, start=10.0 + 3600.0 * n, step_s=3.0) for n in range(3)]
    assert an_hour[0] > an_hour[2]
    assert an_hour[2] <= 30


def test_a_dearer_batch_that_was_under_way_raises_nothing() -> None:
    limit = CostLimit()
    limit.on_out_of_memory(0.0, 100.0, 50.0)
    low = limit.value
    limit.on_out_of_memory(0.1, 1000.0, 500.0)
    assert limit.value == low


def test_a_prediction_caps_the_bound() -> None:
    limit = CostLimit()
    limit.cap = 12.0
    assert limit.value == 12.0
