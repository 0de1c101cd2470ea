"""Batches, padding, randomness and modes of the kinds, each against what is true of it; in this process."""

from pathlib import Path

import pytest

from deployments.audit import modes, randomness
from deployments.audit.batches import Crowds
from deployments.audit.findings import Property
from deployments.audit.forks import Isolate, here, in_fork
from deployments.audit.subject import Subject, calls_of, load
from deployments.audit.target import Input, Target
from deployments.audit.writes import Write, writes_of
from tests.audit import kinds
from tests.audit.kinds import TRUTH

FOLDER = str(Path(__file__).parents[2])
NAMES = [kind.__name__ for kind in TRUTH]
KEEPS = {kind.__name__ for kind, false in TRUTH.items() if "order_independent" in false}
"""Only forks tell their history from their batch-mates; the others do without, at a tenth of the time. These
are called in forks alone: what their module's globals keep would be another test's history."""


def subject_of(name: str) -> Subject:
    return load(Target(f"tests.audit.kinds:{name}", folder=FOLDER))


def warmed(name: str) -> Subject:
    subject = subject_of(name)
    for batch in calls_of(subject):
        subject.call(batch)
    return subject


def holds(name: str, what: str) -> bool:
    return what not in TRUTH[getattr(kinds, name)]


def isolation_of(name: str) -> Isolate:
    return in_fork if name in KEEPS else here


@pytest.mark.parametrize("name", NAMES)
def test_batch_mates_are_found_to_matter_or_not(name: str) -> None:
    isolate = isolation_of(name)
    subject = subject_of(name)
    is_random = isolate(lambda: randomness.is_random(lambda: subject.call((Input(0),))))
    found = Crowds(subject, is_random=is_random, isolate=isolate).check_mates()
    assert found.holds is holds(name, "batch_invariant"), found


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(getattr(kinds, n), kinds.Ragged)])
def test_padding_is_found_to_matter_or_not(name: str) -> None:
    found = isolation_of(name)(lambda: Crowds(warmed(name)).check_padding())
    assert found.holds is holds(name, "padding_invariant"), found


def test_padding_is_undecided_where_nothing_is_padded() -> None:
    found = Crowds(warmed("CleanCnn")).check_padding()
    assert found.holds is None
    assert "padded" in found.reason


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_are_found_with_their_source(name: str) -> None:
    def check() -> Property:
        subject = warmed(name)
        return randomness.check(lambda: subject.call((Input(0),)), in_fork)

    found = isolation_of(name)(check)
    assert found.holds is holds(name, "deterministic"), found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("DropoutLeftOn", "torch's global generator"),
        ("PythonsRandom", "Python's random"),
        ("OwnGenerator", "of the model's own"),
    ],
)
def test_source_of_random_numbers_is_named(name: str, source: str) -> None:
    subject = warmed(name)
    found = randomness.check(lambda: subject.call((Input(0),)))
    assert source in found.reason


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_a_mode_for_training_is_named(name: str) -> None:
    def check() -> Property:
        subject = warmed(name)
        return modes.check(subject.instance, lambda: subject.call((Input(0),)))

    found = isolation_of(name)(check)
    assert found.holds is holds(name, "eval_mode"), found


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("CounterForMetrics", "self.calls"),
        ("KeysKeptOnSelf", "self.keys"),
        ("ScratchWrittenInPlace", "self.scratch"),
        ("GlobalDict", "GLOBAL"),
        ("ClassAttribute", "ClassAttribute.shared"),
        ("SkipStackOnSelf", "self.skips"),
        ("HookThatStores", "self.kept"),
        ("MovingAverageInForward", "self.average"),
    ],
)
def test_writes_are_found_with_their_line(name: str, attribute: str) -> None:
    def look() -> list[Write]:
        subject = warmed(name)
        return writes_of(lambda: subject.call((Input(1),)))

    writes = isolation_of(name)(look)
    (found,) = {write.attribute: write for write in writes if write.attribute == attribute}.values()
    line = Path(found.file).read_text().splitlines()[found.line - 1]
    assert attribute.rpartition(".")[2] in line


class Unknown:
    """NaN differs from itself."""

    def __init__(self) -> None:
        self.scale = float("nan")

    def __call__(self) -> float:
        x = 1.0
        return x * self.scale


def test_nan_that_nobody_writes_is_no_write() -> None:
    assert writes_of(Unknown()) == []


@pytest.mark.parametrize("name", ["CleanCnn", "CleanEncoder", "SkipStackLocal", "MeanPoolingWithMask"])
def test_model_that_writes_nothing_shows_no_write(name: str) -> None:
    subject = warmed(name)
    assert writes_of(lambda: subject.call((Input(0),))) == []
