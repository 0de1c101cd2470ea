"""Tuning for latency: the largest rate of arrivals that keeps a bound, and the setting that carries it.

Owns: who is worth offering rates to. Must not know: how rates are searched (latency.py), processes, YAML.
"""

from scripts.tune.latency import RateSearch, conclude, simplest
from scripts.tune.points import OutOfBudget, Point
from scripts.tune.result import Result
from scripts.tune.session import Session

MORE_PROBES = 2
"""At the rate that was found: how far apart are its p99?"""
MOST_SHAPES = 3
"""Of slots and threads, that are offered rates: a probe takes seconds."""


class ByRate(Session):
    """`run` once."""

    def run(self) -> Result:
        self.begin()
        result = self.result
        rates = RateSearch(self.crew.offer, self.budget, self.say, self.wish.p99_ms)
        kept: list[Point] = []
        rate = 0.0
        try:
            best = self.search.climb(self.app.start, self.sizes())
            points = self._timely(best)
            capacity = max(self.median(point) for point in self.search.looks)
            kept, rate = rates.run(points, capacity)
            self.budget.reserve_s = 0.0
            for _ in range(MORE_PROBES if kept else 0):
                rates.probe(simplest(kept, self.app.start), rate)
        except OutOfBudget:
            result.notes.append(f"the budget of {self.budget.seconds:.0f} s ended the search")
            if not kept:
                result.why = self.too_little()
        self.finish_curves()
        if not result.why:
            conclude(result, rates, kept, rate, self.wish.p99_ms)
        return result

    def _timely(self, best: Point) -> list[Point]:
        """Who may carry the most: the shapes of the largest capacity, batches no longer than the bound."""
        shapes = self.neighbours(best)
        self.open(shapes)
        race = self.search.race(
            [*(best.with_shape(s) for s in shapes if self.crew.is_open(s)), best], rounds=2
        )
        ranked = sorted(race.values, key=lambda p: -max(race.values[p]))[:MOST_SHAPES]
        curve = self.search.curve("batch", list(self.search.looks)).rates
        points = {self.app.start: None}
        for point in ranked:
            slots = point.shape.slots
            fitting = [b for b, r in sorted(curve.items()) if 1e3 * slots * b / max(r) <= self.wish.p99_ms]
            points |= dict.fromkeys(point.with_batch(size) for size in fitting[-2:] or [min(curve)])
        self.crew.keep([point.shape for point in points])
        return sorted(points, key=lambda p: (p.batch, p.shape.slots, p.shape.threads))
