"""What a whole tuning concludes, with processes that only pretend, in virtual time."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.core.contract import Limits
from scripts.tune.application import Application
from scripts.tune.by_rate import ByRate
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape, Started
from scripts.tune.result import Result
from scripts.tune.search import Budget
from scripts.tune.session import Session, Wish
from scripts.tune.tuning import Tuning

START_S = 3.0
THROUGHPUT = Wish()


class ToyCrew:
    """Every shape starts in START_S and runs at rate(point), busy; p99 is the time of a batch, doubled."""

    def __init__(self, rate: Callable[[Point], float]) -> None:
        self.now_s, self.failed = 0.0, dict[Shape, str]()
        self.started = Started("cpu", "items", (1.0, 1.0), 2**20, None)
        self._rate, self._source, self._open = rate, random.Random(5), set[Shape]()

    def open(self, shapes: Sequence[Shape], batch: int) -> None:
        self.now_s += START_S * len(shapes)
        self._open |= set(shapes)

    def is_open(self, shape: Shape) -> bool:
        return shape in self._open

    def keep(self, shapes: Sequence[Shape]) -> None:
        self._open &= set(shapes)

    def look(self, point: Point, seconds: float) -> Look:
        if point.shape not in self._open:
            raise CouldNotRun("it is not open")
        self.now_s += seconds + 0.3
        rate = self._rate(point) * math.exp(self._source.gauss(0.0, 0.03))
        return Look(rate, point.batch, 2e3 * point.batch / rate, busy=0.5)

    def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look:
        self.now_s += seconds
        load = rate / self._rate(point)
        p99_ms = 1e3 * point.batch / self._rate(point) / max(1e-3, 1.0 - load)
        return Look(rate, p99_ms=p99_ms, late_share=float(p99_ms > late_ms))


def application(start: Point, *, mode: str = "shared", is_continuous: bool = False) -> Application:
    job = Job("toy", "toys:Toy", {}, Limits(), is_continuous)
    return Application("toy", job, start, 2, Path("config.yaml"), args={}, mode=mode)


def tuned(
    rate: Callable[[Point], float],
    start: Point,
    budget_s: float = 300.0,
    wish: Wish = THROUGHPUT,
    **more: object,
) -> Result:
    crew = ToyCrew(rate)
    kind: type[Session] = ByRate if wish.objective == "latency" and not more.get("is_continuous") else Tuning
    app = application(start, **more)  # type: ignore[arg-type]
    return kind(app, wish, crew, Budget(budget_s, lambda: crew.now_s), lambda text: None).run()  # type: ignore[arg-type]


def knee(point: Point) -> float:
    """Batches help up to 16, a second slot by a third, a second process not at all."""
    slots = 1.33 if point.shape.slots * point.shape.replicas > 1 else 1.0
    return slots * point.batch / (0.02 * math.ceil(point.batch / 16) + 0.0001 * point.batch)


def test_batch_and_slots_are_changed_with_their_reasons() -> None:
    result = tuned(knee, Point(Shape(1, 2), 4))
    assert result.decided
    changes = {change.key: change for change in result.changes}
    assert set(changes) == {"max_batch_size", "slots"}
    assert changes["max_batch_size"].value in (16, 32)
    assert "times as fast" in changes["max_batch_size"].reason
    assert changes["slots"].value == 2
    assert "times (95 % between" in changes["slots"].reason
    assert "what 1 slot x 2 threads gives" in changes["slots"].reason
    assert result.gain is not None
    assert result.gain["low"] > 3.0
    assert any("2 replicas" in note and "not worth the memory" in note for note in result.notes)


def test_good_values_stay() -> None:
    result = tuned(knee, Point(Shape(2, 1), 16))
    assert result.decided
    assert result.changes == []
    assert "the config's values stay" in result.why


def test_one_slot_where_nothing_says_that_more_are_safe() -> None:
    result = tuned(knee, Point(Shape(1, 2), 16), mode="auto")
    assert result.chosen.shape.slots == 1


def test_processes_are_taken_where_they_are_clearly_faster() -> None:
    def held(point: Point) -> float:  # by the interpreter's lock: threads gain nothing
        return 100.0 * point.shape.replicas

    result = tuned(held, Point(Shape(1, 2), 1), mode="processes")
    assert {change.key: change.value for change in result.changes} == {"threads": 1, "num_replicas": 2}


@pytest.mark.parametrize("budget_s", [2.0, 5.0])
def test_too_small_a_budget_keeps_the_configs_values_and_says_so(budget_s: float) -> None:
    result = tuned(knee, Point(Shape(1, 2), 4), budget_s)
    assert not result.decided
    assert result.chosen.batch == 4
    assert result.changes == []
    assert "too little to decide" in result.why
    assert "--budget-s 60" in result.why


def test_a_bound_of_the_latency_makes_batches_small() -> None:
    result = tuned(knee, Point(Shape(2, 1), 256), wish=Wish("latency", 60.0))
    assert result.decided
    assert result.chosen.batch <= 32
    assert "within 60 ms" in result.why
    text = "\n".join(result.lines())
    assert "max_batch_size" in text


def test_a_bound_that_nothing_keeps_is_said() -> None:
    result = tuned(knee, Point(Shape(2, 1), 16), wish=Wish("latency", 1.0))
    assert not result.decided
    assert "no rate keeps p99 within 1 ms" in result.why


def test_gaps_of_a_continuous_application_are_bounded() -> None:
    def steps(point: Point) -> float:  # 10 ms and 1 ms a sequence
        return point.batch / (0.010 + 0.001 * point.batch)

    start = Point(Shape(1, 2), 64, 256.0)
    result = tuned(steps, start, wish=Wish("latency", 60.0), is_continuous=True, mode="exclusive")
    assert result.decided
    assert result.chosen.batch in (8, 16)  # 2 x 18 and 2 x 26 ms; 32 take 84
    assert "which the config's values don't keep" in result.why
    none = tuned(steps, start, wish=Wish("latency", 5.0), is_continuous=True, mode="exclusive")
    assert not none.decided
    assert "no setting that was tried keeps the gaps within 5 ms" in none.why


def test_a_process_that_can_not_start_is_noted_and_the_rest_goes_on() -> None:
    class Failing(ToyCrew):
        def open(self, shapes: Sequence[Shape], batch: int) -> None:
            super().open([s for s in shapes if s.slots == 1], batch)
            self.failed |= {s: "no memory" for s in shapes if s.slots > 1}

    crew = Failing(knee)
    app = replace(application(Point(Shape(1, 2), 4)))
    result = Tuning(app, Wish(), crew, Budget(300.0, lambda: crew.now_s), lambda text: None).run()  # type: ignore[arg-type]
    assert result.decided
    assert any("not tried: 2 slots x 1 thread: no memory" in note for note in result.notes)
