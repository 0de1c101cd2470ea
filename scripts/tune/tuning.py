"""One tuning of one application, from its config's values to the lines that should stand there.

Owns: which keys are tried in which order, and when a choice is good enough to change the config. Must not
know: processes' insides, YAML, how looks are shown. Order: how far batches help, then slots and threads,
the variant, processes a device; then the batch again where those changed; last, the choice against the
config's own values.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from scripts.tune.certainty import Ratio
from scripts.tune.changes import REASONS, changes_of
from scripts.tune.points import CouldNotRun, OutOfBudget, Point
from scripts.tune.result import Result
from scripts.tune.search import CLEARLY
from scripts.tune.session import BUSY, Session
from scripts.tune.verified import TAKES_S, promising, verified

NEAR = 0.95
"""Batch sizes within this part of the best of a curve of single looks are looked at again, in turns."""
COSTS = (2.0, 4.0)
"""Times the bound, where that is what keeps batches small."""
TOKENS = (64.0, 128.0, 256.0, 512.0, 1024.0)
"""Of a language model's step."""
LIKELY = 1.05
"""So much faster in a race of few rounds is taken though it isn't sure: the last comparison has more."""
LEAST_GAIN = 1.03
"""For less than this a bound that is there for memory stays."""


class Tuning(Session):
    """For throughput; of a continuous application also for the gaps that the wish allows. `run` once."""

    def run(self) -> Result:
        """Raises CouldNotRun where the application can't be measured at all."""
        self._reasons: dict[str, str] = {}
        self.begin()
        try:
            self._choose()
        except OutOfBudget:
            self.result.notes.append(f"the budget of {self.budget.seconds:.0f} s ended the search")
        self._conclude(self.result.chosen)
        return self.result

    # -- the search -------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Leaves the best so far in `result.chosen`, however far the budget lets it come."""
        best = self.search.climb(self.app.start, self.sizes())
        self.result.chosen = best
        times = self.median(best) / max(1e-9, self.median(self.app.start))
        if best != self.app.start and self.median(self.app.start):
            self._reasons["batch"] = f"{times:.2f} times what {self.app.start.batch} gives (one look at each)"
        self.open([self.app.start.shape])  # a size that ended its process ended the curve
        shaped = self._shape(best)
        best = self._batch(shaped, is_new=shaped.shape != best.shape)
        self._replicas(self._variant(self._cost(best)))

    def _shape(self, best: Point) -> Point:
        """Slots and threads: uphill, a step at a time."""
        tried = {best.shape}
        while True:
            new = [shape for shape in self.neighbours(best) if shape not in tried]
            if self.app.job.is_continuous:
                new = [shape for shape in new if shape.slots == 1]
            tried |= set(new)
            self.open(new)
            points = [best.with_shape(shape) for shape in new if self.crew.is_open(shape)]
            if not points:
                return best
            race = self.search.race([*points, best])
            winner = race.leader()
            sure = race.over(winner, best)
            if winner == best or not (sure.is_better or sure.times > LIKELY):
                if "shape" not in self._reasons:
                    self._explain_shape(best, points, race.over)
                return best
            self._explain_shape(winner, [p for p in (best, *points) if p != winner], race.over)
            best = winner
            self.result.chosen = best
            self.crew.keep([best.shape, self.app.start.shape])

    def _batch(self, best: Point, *, is_new: bool) -> Point:
        """Sizes around the best one, in turns."""
        sizes = self.sizes()
        curve = self.search.curve("batch", [p for p in self.search.looks if p.shape == self.app.start.shape])
        top = max(max(rates) for rates in curve.rates.values())
        good = min(size for size, rates in curve.rates.items() if max(rates) >= NEAR * top)
        index = sizes.index(good)
        near = {*sizes[max(0, index - 1) : index + 2], best.batch}
        if not is_new and self.app.start.batch <= 2 * good:
            near.add(self.app.start.batch)
        race = self.search.race([best.with_batch(size) for size in sorted(near)])
        chosen = race.simplest()
        others = sorted((p for p in race.values if p != chosen), key=lambda p: abs(p.batch - chosen.batch))
        compared = sorted(others[:2], key=lambda p: p.batch)
        self._reasons["batch"] = ", ".join(
            f"{p.batch} is {race.over(p, chosen).times:.2f} times as fast" for p in compared
        )
        self.result.chosen = chosen
        return chosen

    def _cost(self, best: Point) -> Point:
        """What a batch may cost, where that bound is what keeps batches small; of a language model, the
        tokens of a step."""
        started = self.crew.started
        bound = best.cost or started.max_batch_cost
        if started.is_language:
            candidates = [best.with_cost(tokens) for tokens in sorted({*TOKENS, best.cost or TOKENS[0]})]
        elif self.app.job.is_continuous or bound is None or self._is_full(best):
            return best
        else:
            candidates = [best, *(best.with_cost(bound * times) for times in COSTS)]
        race = self.search.race(candidates)
        leader = race.leader()
        sure = race.over(leader, best)
        # The bound is there for memory: it gives way to a clear gain only.
        if leader == best or not sure.is_better or sure.times < LEAST_GAIN:
            return best
        self._reasons["cost"] = f"{sure.text()} what {bound:g} gives"
        self.result.chosen = leader
        return leader

    def _is_full(self, point: Point) -> bool:
        return self.search.looks[point][-1].size >= 0.9 * point.batch

    def _variant(self, best: Point) -> Point:
        """Variants of the model, each alone; the fastest that the audit lets serve."""
        names = promising(self.result.device, best.shape.variant) if self.wish.with_variants else []
        shapes = [replace(best.shape, variant=name) for name in names]
        self.open(shapes)
        points = [best.with_shape(shape) for shape in shapes if self.crew.is_open(shape)]
        if not points:
            return best
        race = self.search.race([best, *points])
        for point in sorted(points, key=lambda point: -race.over(point, best).times):
            sure = race.over(point, best)
            name = "+".join(point.shape.variant)
            if not sure.is_better or sure.times < LEAST_GAIN:
                break
            self.budget.need(TAKES_S)
            self.crew.keep([best.shape, point.shape, self.app.start.shape])
            found = verified(self.app, point, self.result.device, self.say)
            if found["accepted"]:
                self._reasons["variant"] = f"{sure.text()} what the plain model gives; {found['reason']}"
                self.result.chosen = point
                return point
            self.result.notes.append(
                f"optimise: [{name}] would be {sure.text()} as fast, but {found['reason']}"
            )
        return best

    def _replicas(self, best: Point) -> None:
        """Two processes on the device, with its threads shared; for a clear gain only."""
        shape = best.shape
        threads = shape.threads if shape.slots > 1 else max(1, shape.threads // 2)
        two = replace(shape, slots=max(1, shape.slots // 2), threads=threads, replicas=2)
        if not self.app.may_replicate:
            return
        if shape.threads == 1 and self.busy(best) >= BUSY:  # of more threads some may only spin
            self.result.notes.append(
                f"replicas not tried: one process keeps {100 * self.busy(best):.0f} % of the CPUs busy"
            )
            return
        self.open([two])
        if not self.crew.is_open(two):
            return
        point = best.with_shape(two)
        race = self.search.race([best, point])
        sure = race.over(point, best)
        if sure.low <= CLEARLY:
            self.result.notes.append(
                f"2 replicas on this device: {sure.text()} what one gives; not worth the memory"
            )
            return
        self._reasons["replicas"] = f"{sure.text()} what one process gives"
        self.result.chosen = point

    def _explain_shape(
        self, chosen: Point, others: Sequence[Point], over: Callable[[Point, Point], Ratio]
    ) -> None:
        against = self.app.start if self.app.start.shape in {p.shape for p in others} else others[0]
        other = next(p for p in others if p.shape == against.shape)
        self._reasons["shape"] = f"{over(chosen, other).text()} what {other.shape.text()} gives"

    # -- the end ----------------------------------------------------------------------------------------

    def _conclude(self, chosen: Point) -> None:
        """The choice against the config's own values: change the config only for what is surely better."""
        result, start = self.result, self.app.start
        result.chosen = chosen
        self.finish_curves()
        if chosen == start:
            result.decided = len(self.search.looks.get(start, [])) >= 2
            stays = f"the config's values stay: nothing that was tried is faster ({self.shown(start)})"
            result.why = stays if result.decided else self.too_little()
        elif not self._compare(chosen):
            result.chosen, result.why = start, self.too_little()
        if self.keeps_bound(result.chosen):
            return
        result.chosen, result.changes, result.decided = start, [], False
        result.why = (
            f"no setting that was tried keeps the gaps within {self.wish.p99_ms:g} ms: the config's values "
            f"stay; {self.app.batch_key} {min(p.batch for p in self.search.looks)} is the least: allow more "
            "(--p99-ms)"
        )

    def _compare(self, chosen: Point) -> bool:
        """Once more with the config's values, in turns; False where there is no time left for it."""
        result, start = self.result, self.app.start
        try:
            self.say("the choice against the config's values, in turns")
            sure = self.search.compare(chosen, start)
        except (OutOfBudget, CouldNotRun):
            return False
        result.rate, result.now_rate = self.median(chosen), self.median(start)
        if not self.keeps_bound(start):
            result.decided = True
            within = f"gaps within {self.wish.p99_ms:g} ms"
            result.why = f"{self.shown(chosen)} with {within}, which the config's values don't keep"
            self._reasons = dict.fromkeys(REASONS, f"keeps p99 of the gaps within {self.wish.p99_ms:g} ms")
            result.changes = changes_of(self.app, chosen, self._reasons)
            return True
        result.gain = {"times": round(sure.times, 3), "low": round(sure.low, 3), "high": round(sure.high, 3)}
        if sure.is_better:
            result.decided = True
            result.why = f"{self.shown(chosen)}: {sure.text()} what the config's values give"
            result.changes = changes_of(self.app, chosen, self._reasons)
            return True
        result.chosen = start
        result.decided = sure.high < 1.1 or sure.is_flat(0.05)
        result.why = (
            f"the config's values stay: batch {chosen.batch}, {chosen.shape.text()} is not surely faster, "
            f"{sure.text()}"
        )
        return True
