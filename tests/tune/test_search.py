"""The search, on made-up machines in virtual time: what it chooses, when it stops, how sure it says it is."""

import math
import random
from collections.abc import Callable

import pytest

from scripts.tune.certainty import ratio
from scripts.tune.latency import RateSearch
from scripts.tune.points import Look, OutOfBudget, Point, Shape
from scripts.tune.search import Budget, Search, neighbours

ONE, TWO = Shape(1, 2), Shape(2, 1)
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class Machine:
    """rate(point) with 5 % noise, on a machine that becomes 1 % slower with every look."""

    def __init__(self, rate: Callable[[Point], float], noise: float = 0.05) -> None:
        self.now_s, self.looks = 0.0, 0
        self._rate, self._noise, self._source = rate, noise, random.Random(3)

    def measure(self, point: Point, seconds: float) -> Look:
        self.now_s += seconds + 0.2
        self.looks += 1
        drift = 0.99**self.looks
        return Look(
            self._rate(point) * drift * math.exp(self._source.gauss(0.0, self._noise)), float(point.batch)
        )

    def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look:
        self.now_s += seconds
        load = rate / self._rate(point)
        return Look(rate, p99_ms=1e3 * point.batch / self._rate(point) / max(1e-3, 1.0 - load))

    def search(self, budget_s: float = 300.0) -> Search:
        return Search(self.measure, Budget(budget_s, lambda: self.now_s), lambda text: None)


def knee(point: Point) -> float:
    """20 ms for each 16 begun: 16 is as good as any multiple."""
    return point.batch / (0.02 * math.ceil(point.batch / 16) + 0.0001 * point.batch)


def test_the_curve_ends_where_it_is_flat() -> None:
    search = Machine(knee, noise=0.02).search()
    assert search.climb(Point(ONE, 4), SIZES).batch == 16
    assert max(point.batch for point in search.looks) == 64


def test_a_curve_that_rises_is_followed_to_its_end() -> None:
    search = Machine(lambda point: point.batch / (0.1 + 0.0001 * point.batch)).search()
    search.climb(Point(ONE, 4), SIZES)
    assert max(point.batch for point in search.looks) == 256


def test_of_equals_the_smallest_batch_is_chosen() -> None:
    search = Machine(knee, noise=0.005).search()
    race = search.race([Point(ONE, size) for size in (8, 16, 32, 64)])
    assert race.simplest().batch == 16


def test_a_race_finds_a_fifth_more_through_noise_and_drift() -> None:
    for seed in range(20):
        machine = Machine(lambda point: 120.0 if point.shape == TWO else 100.0)
        machine._source.seed(seed)
        race = machine.search().race([Point(ONE, 8), Point(TWO, 8), Point(Shape(1, 1), 8)])
        assert race.leader().shape == TWO


def test_the_last_comparison_says_how_sure_it_is() -> None:
    machine = Machine(lambda point: 131.0 if point.shape == TWO else 100.0)
    sure = machine.search().compare(Point(TWO, 8), Point(ONE, 8))
    assert sure.is_better
    assert sure.low < 1.31 < sure.high
    assert "95 % between" in sure.text()


def test_equals_are_not_called_better() -> None:
    wrong = 0
    for seed in range(40):
        machine = Machine(lambda point: 100.0)
        machine._source.seed(seed)
        wrong += machine.search().compare(Point(TWO, 8), Point(ONE, 8)).is_better
    assert wrong <= 6  # 2.5 % each; it stops at the first sure answer, which adds some


def test_a_budget_too_small_for_two_sizes_decides_nothing() -> None:
    search = Machine(knee).search(budget_s=1.0)
    with pytest.raises(OutOfBudget):
        search.climb(Point(ONE, 4), SIZES)


def test_a_budget_that_ends_on_the_way_keeps_what_is_known() -> None:
    search = Machine(knee).search(budget_s=5.0)
    assert search.climb(Point(ONE, 4), SIZES).batch in (8, 16, 32)


def test_interval_of_one_pair_is_all_and_of_equal_pairs_a_point() -> None:
    assert ratio([2.0], [1.0]).high == math.inf
    sure = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (round(sure.low, 6), round(sure.high, 6)) == (2.0, 2.0)


def test_neighbours_use_no_more_threads_than_there_are_cpus_unless_the_model_waits() -> None:
    assert set(neighbours(ONE, 2, may_share=True, waits=False)) == {TWO}
    assert Shape(4, 1) not in neighbours(TWO, 2, may_share=True, waits=False)
    assert Shape(4, 1) in neighbours(TWO, 2, may_share=True, waits=True)
    assert neighbours(ONE, 2, may_share=False, waits=True) == [Shape(1, 1)]


def test_the_largest_rate_within_a_bound_is_found_to_a_tenth() -> None:
    """p99 is batch time over 1 - load: 100 ms at 0.8 of capacity for 20 ms a batch."""
    machine = Machine(lambda point: 400.0)
    rates = RateSearch(machine.offer, Budget(300.0, lambda: machine.now_s), lambda text: None, 100.0)
    kept, rate = rates.run([Point(ONE, 8), Point(ONE, 64)], 400.0)
    assert [point.batch for point in kept] == [8]
    assert 0.9 * 320.0 <= rate <= 320.0


def test_a_bound_that_nothing_keeps_gives_no_rate() -> None:
    machine = Machine(lambda point: 400.0)
    rates = RateSearch(machine.offer, Budget(300.0, lambda: machine.now_s), lambda text: None, 1.0)
    assert rates.run([Point(ONE, 8)], 400.0) == ([], 0.0)
