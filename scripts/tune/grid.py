"""Every combination, each for as long: slow, and what the search is compared with.

Owns: which combinations, and how long each is looked at. Must not know: processes, YAML. Two passes, forth
and back, so that a machine that drifts favours no end.
"""

import itertools
import statistics
from collections.abc import Callable

from scripts.tune.application import Application
from scripts.tune.changes import REASONS, changes_of
from scripts.tune.points import Look, Point, Shape
from scripts.tune.result import Result
from scripts.tune.session import Session

LOOK_S = 2.5
"""Twice: 5 s a combination know its rate to about 2 % on a quiet machine."""
PASSES = 2
LARGEST_BATCH = 64


def shapes(app: Application) -> list[Shape]:
    """Slots by threads of a slot, each up to the CPUs, and two processes that share the CPUs."""
    powers = [2**power for power in range(7) if 2**power <= max(2, app.cpus)]
    slots = powers if app.may_share else [1]
    found = [Shape(s, t) for s, t in itertools.product(slots, powers) if t <= app.cpus]
    if app.may_replicate:
        found.append(Shape(1, max(1, app.cpus // 2), replicas=2))
    return found


def points(app: Application) -> list[Point]:
    """All combinations of batch and shape, and the config's own."""
    sizes = {2**power for power in range(7)} | {app.start.batch}
    sizes = {size for size in sizes if size <= max(LARGEST_BATCH, app.start.batch)}
    crossed = [Point(shape, size, app.start.cost) for shape in shapes(app) for size in sorted(sizes)]
    return list(dict.fromkeys([*crossed, app.start]))


def measured(
    found: list[Point], measure: Callable[[Point, float], Look], say: Callable[[str], None]
) -> dict[Point, float]:
    """The mean rate of each."""
    rates: dict[Point, list[float]] = {point: [] for point in found}
    for number in range(PASSES):
        for point in found if number % 2 == 0 else reversed(found):
            look = measure(point, LOOK_S)
            rates[point].append(0.0 if look.ran_out else look.rate)
            say(f"batch {point.batch}, {point.shape.text()}: {look.rate:.4g} a second")
    return {point: statistics.fmean(values) for point, values in rates.items()}


class Grid(Session):
    """`run` once."""

    def run(self) -> Result:
        """All combinations instead of a search; the best of them."""
        result, start = self.result, self.app.start
        found = points(self.app)
        self.say(f"{len(found)} combinations, about {len(found) * PASSES * LOOK_S * 1.3:.0f} s")
        self.crew.open([start.shape, *(p.shape for p in found)], self.most_batch)
        result.device = self.crew.started.device
        rates = measured([p for p in found if self.crew.is_open(p.shape)], self.search.measured, self.say)
        result.chosen = max(rates, key=lambda point: rates[point])
        self.finish_curves()
        result.decided, result.why = True, self.shown(result.chosen)
        result.gain = {"times": round(rates[result.chosen] / max(rates[start], 1e-9), 3)}
        reasons = dict.fromkeys(REASONS, f"the best of {len(rates)} combinations")
        result.changes = changes_of(self.app, result.chosen, reasons)
        return result
