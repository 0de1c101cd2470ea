"""Overload, simulated: the issue's figures as properties of the scheduler alone."""

import pytest

from deployments.core.contract import Limits
from tests.core.simulation import Simulation

LIMITS = Limits(max_batch_size=8)
CAPACITY = 80.0  # items a second: 100 ms for a batch of 8


def overloaded(factor: float, *, seconds: float = 20.0, **client: float) -> Simulation:
    simulation = Simulation(LIMITS, lambda cost: 0.1)
    simulation.poisson(factor * CAPACITY, seconds, lambda: simulation.arrive(**client))
    simulation.run()
    return simulation


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_clients_that_said_when_are_served_at_capacity(factor: float) -> None:
    tally = overloaded(factor, patience_s=1.0, timeout_s=1.0).tally
    assert tally.answered_in_time >= 0.95 * CAPACITY * 20.0


@pytest.mark.parametrize("patience_s", [0.3, 0.5, 1.0, 2.0])
def test_clients_that_give_up_unannounced_do_not_turn_the_queue_stale(patience_s: float) -> None:
    tally = overloaded(2.0, patience_s=patience_s).tally
    assert tally.answered_in_time >= 0.85 * CAPACITY * 20.0


def test_most_of_those_turned_away_are_told_at_once_not_left_waiting() -> None:
    tally = overloaded(2.0, patience_s=1.0).tally
    assert tally.refused > 5 * tally.gave_up


def test_below_capacity_nobody_is_turned_away() -> None:
    tally = overloaded(0.75, patience_s=1.0).tally
    assert tally.refused == tally.gave_up == tally.expired == tally.answered_late == 0


def test_patient_clients_fill_the_queue_and_are_answered() -> None:
    simulation = Simulation(LIMITS, lambda cost: 0.1)
    for _ in range(300):
        simulation.at(0.0, simulation.arrive)
    tally = simulation.run()
    assert tally.answered_in_time == 300


def test_a_crowd_that_gave_up_leaves_no_trace_on_ordinary_load() -> None:
    simulation = Simulation(Limits(max_batch_size=8, max_queue_items=4096), lambda cost: 0.1)
    for i in range(2000):
        simulation.at(i * 1e-4, lambda: simulation.arrive(patience_s=0.05))
    simulation.run()
    before = simulation.tally.refused
    simulation.poisson(0.75 * CAPACITY, 30.0, simulation.arrive, start=1.0)
    simulation.tally.latencies_s.clear()
    tally = simulation.run()
    assert tally.refused == before
    assert sorted(tally.latencies_s)[len(tally.latencies_s) // 2] < 0.25


def test_a_load_generator_that_is_stopped_does_not_look_like_impatience() -> None:
    simulation = Simulation(LIMITS, lambda cost: 0.1)
    for _ in range(64):
        simulation.at(0.0, lambda: simulation.arrive(patience_s=0.45))
    for _ in range(64):
        simulation.at(0.451, simulation.arrive)
    assert simulation.run().refused == 0
    assert simulation.scheduler.admission.overload.patience_s is None


def test_overload_that_ends_is_forgotten() -> None:
    simulation = Simulation(LIMITS, lambda cost: 0.1)
    simulation.poisson(160.0, 10.0, lambda: simulation.arrive(patience_s=0.5))
    simulation.poisson(60.0, 40.0, simulation.arrive, start=10.0)
    simulation.run()
    assert simulation.scheduler.admission.overload.patience_s is None


@pytest.mark.parametrize(("rate", "limit_s"), [(150.0, 0.120), (5.0, 0.050)])
def test_a_slow_model_answers_fast_when_batches_form_late(rate: float, limit_s: float) -> None:
    simulation = Simulation(Limits(max_batch_size=32), lambda cost: 0.040 + 0.002 * cost)
    simulation.poisson(rate, 30.0, simulation.arrive)
    latencies_s = sorted(simulation.run().latencies_s)
    assert latencies_s[len(latencies_s) // 2] <= limit_s


def test_under_a_backlog_batches_are_full() -> None:
    simulation = Simulation(Limits(max_batch_size=16), lambda cost: 0.05)
    for _ in range(1000):
        simulation.at(0.0, simulation.arrive)
    fills = simulation.run().fills[1:-1]  # the first item finds the slot idle and goes alone
    assert sum(fills) / len(fills) >= 0.95 * 16


@pytest.mark.parametrize("said", [True, False])
def test_batches_that_would_take_longer_than_clients_wait_are_made_smaller(said: bool) -> None:
    # As MiniLM on a slow machine: time goes with cost, a full batch takes 1.3 s in each of two slots.
    simulation = Simulation(Limits(max_batch_size=32, slots=2), lambda cost: 0.005 + 0.04 * cost)
    client = {"patience_s": 1.0, "timeout_s": 1.0} if said else {"patience_s": 1.0}
    simulation.poisson(100.0, 30.0, lambda: simulation.arrive(**client))
    assert simulation.run().answered_in_time >= (0.9 if said else 0.8) * 50.0 * 30.0
