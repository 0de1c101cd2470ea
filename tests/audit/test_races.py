"""The search tells a model that threads may not share from its safe twin; a race can be shown again."""

from dataclasses import replace
from pathlib import Path

import pytest

from deployments.audit.instances import known_of
from deployments.audit.instruments import Instruments
from deployments.audit.overlaps import races_of
from deployments.audit.races import Races
from deployments.audit.schedules import Inside
from deployments.audit.subject import load
from deployments.audit.target import LEAST_OF_SLOW, LEAST_TRIALS, Target
from deployments.audit.trials import Trial, stretches
from deployments.audit.turns import Point
from tests.audit import kinds
from tests.audit.kinds import TRUTH

FOLDER = str(Path(__file__).parents[2])
ENDS_THE_PROCESS = {"ScriptedWithState"}
KEEPS_IN_THE_PROCESS = {"GlobalMaximum", "LargestSeenOnSelf"}
"""What it has seen once it has seen for ever: the order of fresh processes' calls shows it, no overlap."""
NAMES = [kind.__name__ for kind in TRUTH if kind.__name__ not in ENDS_THE_PROCESS]


def races(name: str, phase: str = "threads", module: str = "kinds", *, is_slow: bool = False) -> Races:
    target = Target(f"tests.audit.{module}:{name}", folder=FOLDER)
    return races_of(target, replace(known_of(load(target)), is_slow=is_slow), phase)


def is_false(name: str, what: str) -> bool:
    return what in TRUTH[getattr(kinds, name)]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if is_false(name, "thread_safe") and name not in KEEPS_IN_THE_PROCESS]
)
def test_model_that_threads_may_not_share_is_proven_so_and_the_proof_replays(name: str) -> None:
    finding = races(name).search()
    assert finding is not None
    trial = Trial.from_json(finding.trial.as_json())
    assert trial == finding.trial
    again = races(name).run(trial)
    assert again is not None
    if name != "RingOfThree":  # whoever waits for its lock gets it in the system's order
        assert (again.thread, again.points) == (finding.thread, finding.points)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_false(name, "thread_safe")])
def test_safe_twin_is_not_accused(name: str) -> None:
    found = races(name)
    assert found.search(has_time=lambda: found.runs < 30) is None
    assert found.runs == 30


@pytest.mark.parametrize(
    "name", ["GlobalDict", "ClassAttribute", "ClosureKept", "LruCacheOfScratch", "ManualSeedInForward"]
)
def test_what_copies_share_is_found_across_copies(name: str) -> None:
    assert races(name, "copies").search() is not None


@pytest.mark.parametrize(
    "name", ["KeysKeptOnSelf", "HiddenStateKeptBetweenCalls", "CounterAddedToInput", "LruCacheOfPureTable"]
)
def test_copies_that_share_nothing_are_not_accused(name: str) -> None:
    found = races(name, "copies")
    assert found.search(has_time=lambda: found.runs < 30) is None


@pytest.mark.parametrize("name", ["LazyTablePublishedTooEarly", "LazyTableRightWhenRaced"])
def test_first_calls_of_a_fresh_instance_are_raced_apart(name: str) -> None:
    found = races(name, "cold")
    finding = found.search(has_time=lambda: found.runs < 60)
    assert (finding is not None) == is_false(name, "cold_start_safe")


def test_first_calls_are_brought_together_at_the_line_where_they_race() -> None:
    found = races("CopyOnWriteReadBack", "cold", "kinds_sly")
    assert found.search(has_time=lambda: found.runs < 60) is not None


def test_what_an_overlap_of_a_slow_model_spoilt_is_looked_at_in_its_replay() -> None:
    trial = Trial((0, 1), Instruments.BOTH, Inside((1,)))
    made: list[int] = []
    calls = [lambda: made.append(1), lambda: made.append(1)]
    Races(calls, is_slow=True).run(trial)
    seldom = len(made)
    made.clear()
    Races(calls, is_slow=True).run(trial, looks_later=True)
    assert len(made) == seldom + 2


@pytest.mark.parametrize("is_slow", [False, True])
def test_only_more_than_two_calls_in_flight_find_a_ring_of_three(is_slow: bool) -> None:
    found = races("RingOfThree", is_slow=is_slow)
    least = LEAST_OF_SLOW if is_slow else LEAST_TRIALS
    finding = found.search(has_time=lambda: found.runs < least)
    assert finding is not None
    assert isinstance(finding.trial.schedule, Inside)
    assert len(finding.trial.calls) > 2


def test_answer_that_changes_afterwards_is_said_to_share_memory() -> None:
    finding = races("ScratchReturnedAsView").search()
    assert finding is not None
    assert "answer" in finding.how


def test_race_is_told_by_one_pause_where_one_is_enough() -> None:
    finding = races("KeysKeptOnSelf").search()
    assert finding is not None
    assert isinstance(finding.trial.schedule, Inside)
    assert [step["thread"] for step in finding.as_json()["steps"]] == [0, 1, 0]


def test_search_stops_when_its_time_is_over() -> None:
    found = races("SkipStackLocal")
    assert found.search(has_time=lambda: found.runs < 3) is None
    assert found.runs == 3


def test_trials_are_values() -> None:
    found = races("SkipStackLocal")
    assert list(found.trials(seed=1)) == list(found.trials(seed=1))
    assert list(found.trials(seed=1)) != list(found.trials(seed=2))


def test_stretches_fold_what_one_thread_did() -> None:
    points = [Point(0, "a"), Point(0, "b"), Point(1, "c"), Point(0, "d")]
    assert [(s["thread"], s["from"], s["to"], s["points"]) for s in stretches(points)] == [
        (0, "a", "b", 2),
        (1, "c", "c", 1),
        (0, "d", "d", 1),
    ]
