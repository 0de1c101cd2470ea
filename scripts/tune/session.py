"""What every way of tuning has in common: the processes, the looks, the result and its curves.

Owns: starting what is to be measured, what is said and kept of it. Must not know: in which order settings are
tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.tune.application import Application
from scripts.tune.crew import Crew
from scripts.tune.points import Curve, Look, Point, Shape
from scripts.tune.result import Result
from scripts.tune.search import Budget, Search, neighbours

BUSY = 0.85
"""Of the CPUs: with so many in use another slot or process has nothing left to use."""
LARGEST_STEP = 64
"""Sequences that memory is made for where that can't change in place; more, where the config says more."""


@dataclass(frozen=True, slots=True)
class Wish:
    """objective: "throughput" or "latency". p99_ms: what latency may be. with_variants: try `optimise`."""

    objective: str = "throughput"
    p99_ms: float = 100.0
    with_variants: bool = True


class Session:
    """One tuning of one application. say: progress."""

    def __init__(
        self, app: Application, wish: Wish, crew: Crew, budget: Budget, say: Callable[[str], None]
    ) -> None:
        self.app, self.wish, self.crew, self.budget, self.say = app, wish, crew, budget, say
        self.search = Search(crew.look, budget, say, value=self._value)
        self.result = Result(app, wish.objective, app.start, notes=list(app.hints))
        self._start_s = 0.0  # of a process, the last time

    def run(self) -> Result:
        """Raises CouldNotRun where the application can't be measured at all."""
        raise NotImplementedError

    def begin(self) -> None:
        """The process with the config's own values. Raises CouldNotRun where it can't start."""
        self.say(f"starting {self.app.job.model} with the config's values")
        self.crew.open([self.app.start.shape], self.most_batch)
        self._start_s = self.budget.spent_s
        self.result.device = self.crew.started.device
        self.result.unit = "tokens" if self.crew.started.is_language else self.app.unit

    @property
    def is_gpu(self) -> bool:
        return self.result.device != "cpu"

    def neighbours(self, point: Point) -> list[Shape]:
        """Shapes one step away from a point that was looked at."""
        return neighbours(
            point.shape,
            self.app.cpus,
            may_share=self.app.may_share,
            waits=self.busy(point) < BUSY,
            is_gpu=self.is_gpu,
        )

    def _value(self, look: Look) -> float:
        """Of a continuous application whose gaps are bounded: what breaks the bound is worth nothing."""
        return 0.0 if look.ran_out or self._is_late(look) else look.rate

    def _is_late(self, look: Look) -> bool:
        is_bounded = self.app.job.is_continuous and self.wish.objective == "latency"
        return is_bounded and look.p99_ms > self.wish.p99_ms

    def keeps_bound(self, point: Point) -> bool:
        """In most looks at it; always True where there is no bound."""
        looks = self.search.looks.get(point, [])
        return 2 * sum(self._is_late(look) for look in looks) <= len(looks)

    @property
    def most_batch(self) -> int:
        """What memory is made for where that can't change in place."""
        return (
            max(self.app.start.batch, LARGEST_STEP)
            if self.app.job.is_continuous
            else min(8, self.app.start.batch)
        )

    def sizes(self) -> list[int]:
        """Batch sizes to look at."""
        return [
            size for size in self.app.batches() if self.most_batch >= size or not self.app.job.is_continuous
        ]

    def open(self, shapes: Sequence[Shape]) -> None:
        """Processes for these shapes; which can't be had is noted. Raises OutOfBudget."""
        shapes = [shape for shape in shapes if not self.crew.is_open(shape)]
        if not shapes:
            return
        self.budget.need(self._start_s * len(shapes))
        self.say(f"starting {', '.join(shape.text() for shape in shapes)}")
        began_s = self.budget.spent_s
        self.crew.open(shapes, self.most_batch)
        self._start_s = (self.budget.spent_s - began_s) / len(shapes)
        for shape in shapes:
            if shape in self.crew.failed:
                self.result.notes.append(f"not tried: {shape.text()}: {self.crew.failed[shape]}")

    def busy(self, point: Point) -> float:
        """Part of all CPUs that it kept in use."""
        looks = self.search.looks.get(point, [])
        return max((look.busy for look in looks), default=0.0)

    def median(self, point: Point) -> float:
        rates = sorted(look.rate for look in self.search.looks.get(point, ()))
        return rates[len(rates) // 2] if rates else 0.0

    def shown(self, point: Point) -> str:
        self.result.rate = self.median(point)
        self.result.now_rate = self.result.now_rate or self.median(self.app.start)
        return (
            f"{self.app.batch_key} {point.batch}, {point.shape.text()}: "
            f"{self.result.rate:.4g} {self.result.unit}/s"
        )

    def too_little(self) -> str:
        return (
            f"{self.budget.seconds:.0f} s are too little to decide, so the config's values stay; "
            f"try --budget-s {max(60, round(2 * self.budget.seconds / 10) * 10)}"
        )

    def finish_curves(self) -> None:
        """Of the batch in the chosen shape (or that of the config where more is known), and of shapes."""
        chosen, start = self.result.chosen, self.app.start
        batches = max(
            (
                self.search.curve(
                    "batch", [p for p in self.search.looks if p.shape == of.shape and p.cost == of.cost]
                )
                for of in (chosen, start)
            ),
            key=lambda curve: len(curve.rates),
        )
        batches.rates = dict(sorted(batches.rates.items()))
        shapes: dict[int, Curve] = {}
        for point in self.search.looks:
            curve = shapes.setdefault(point.batch, Curve("shape"))
            for look in self.search.looks[point]:
                curve.add(point.shape, look.rate)
        self.result.looks = self.search.looks
        self.result.curves = [
            batches,
            max(shapes.values(), key=lambda curve: len(curve.rates), default=Curve("shape")),
        ]

    def stopped(self) -> Result:
        """What is known when somebody ends it on the way."""
        result = self.result
        self.finish_curves()
        if self.search.looks:
            best = max(self.search.looks, key=self.median)
            result.why = f"stopped before the end; the best so far: {self.shown(best)}"
        else:
            result.why = "stopped before anything was measured"
        result.chosen = self.app.start
        return result
