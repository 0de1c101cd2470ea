"""The largest rate of Poisson arrivals whose p99 stays within a bound, and which setting carries it.

Owns: the bisection. All that are left are offered the same rate in turns; where some keep up, the others drop
out and the rate rises, where none does, it falls. Must not know: processes, torch, YAML.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scripts.tune.changes import REASONS, changes_of
from scripts.tune.points import Look, OutOfBudget, Point
from scripts.tune.result import Result
from scripts.tune.search import Budget, Say

Offer = Callable[[Point, float, float, float], Look]

REQUESTS = 250
"""Of one probe: its p99 then rests on the three latest."""
LEAST_S, MOST_S = 1.5, 8.0
NARROW = 1.08
"""Bounds of the rate no further apart than this are one rate."""
HOPELESS = 0.05
"""Of the capacity: who is late there is late at any rate that is worth having."""


@dataclass(slots=True)
class Rates:
    """carried: of each point the largest rate at which it kept the bound. late: the least at which not."""

    carried: dict[Point, float] = field(default_factory=dict)
    late: dict[Point, float] = field(default_factory=dict)
    probes: dict[Point, list[tuple[float, float]]] = field(default_factory=dict)
    """(rate, p99_ms) of every probe."""


class RateSearch:
    """Probes through `offer`; all probes are kept in `rates`."""

    def __init__(self, offer: Offer, budget: Budget, say: Say, p99_ms: float) -> None:
        self._offer, self._budget, self._say, self._p99_ms = offer, budget, say, p99_ms
        self.rates = Rates()
        self.high = 0.0
        """The least rate that nobody carried."""

    def probe(self, point: Point, rate: float) -> bool:
        """Whether it keeps the bound at this rate; who fails, fails twice: a hiccup of the machine is not the
        setting's. Raises OutOfBudget."""
        is_kept = self._probe(point, rate) <= self._p99_ms or self._probe(point, rate) <= self._p99_ms
        known = self.rates.carried if is_kept else self.rates.late
        pick = max if is_kept else min
        known[point] = pick(known.get(point, rate), rate)
        return is_kept

    def _probe(self, point: Point, rate: float) -> float:
        seconds = min(MOST_S, max(LEAST_S, REQUESTS / rate))
        self._budget.need(1.3 * seconds)
        look = self._offer(point, rate, seconds, self._p99_ms)
        # One late answer of 250 is no hundredth; a probe that was ended early has no p99 of its own.
        p99_ms = look.p99_ms if look.late_share < 1.0 else max(look.p99_ms, 2.0 * self._p99_ms)
        self.rates.probes.setdefault(point, []).append((rate, p99_ms))
        self._say(f"{rate:.4g} a second: p99 {p99_ms:.0f} ms (batch {point.batch}, {point.shape.text()})")
        return p99_ms

    def run(self, points: Sequence[Point], capacity: float) -> tuple[list[Point], float]:
        """(the points that carry the largest rate, that rate); ([], 0) where no rate keeps the bound.

        points: the simplest first. capacity: of the best of them, saturated, a second. A budget that is over
        ends it with what is known; raises OutOfBudget before any is.
        """
        low, high, alive, kept = 0.0, 1.05 * capacity, list(points), list[Point]()
        rate = 0.7 * capacity
        while high > NARROW * max(low, HOPELESS * capacity):
            # Far down a probe takes long: is there any rate at all that the quickest can carry?
            asked = alive if low or rate > HOPELESS * capacity else alive[:2]
            try:
                passed = [point for point in asked if self.probe(point, rate)]
            except OutOfBudget:
                if not kept:
                    raise
                break
            if passed:
                low, kept = rate, passed
                alive = passed if asked is alive else alive
            else:
                self.high = high = rate
            rate = math.sqrt(low * high) if low else 0.6 * high
            if not low and rate < 0.3 * capacity:
                rate = HOPELESS * capacity
        return kept, low


def simplest(kept: Sequence[Point], start: Point) -> Point:
    """Of those that carry as much: the config's own, or the first."""
    return start if start in kept else kept[0]


def conclude(result: Result, rates: RateSearch, kept: Sequence[Point], rate: float, p99_ms: float) -> None:
    """What the probes say: the simplest that carries the largest rate, unless the config's own does, too."""
    found, start = rates.rates, result.application.start
    result.rate = rate
    if not kept:
        tried = [probe for probes in found.probes.values() for probe in probes]
        if tried:
            least = min(tried)
            result.why = (
                f"no rate keeps p99 within {p99_ms:g} ms (it is {least[1]:.0f} at {least[0]:.3g} a second): "
                "the config's values stay; allow more (--p99-ms), or give less work an item"
            )
        return
    chosen = simplest(kept, start)
    result.chosen = chosen
    own = sorted(p99 for at, p99 in found.probes[chosen] if at == rate)
    result.p99_ms = round(own[len(own) // 2], 1)
    span = f"p99 {own[0]:.0f} to {own[-1]:.0f} ms in {len(own)} probes"
    result.decided = 0.0 < rates.high <= 1.3 * rate
    late = f"; late at {rates.high:.4g}" if rates.high else ""
    result.why = f"{rate:.4g} {result.unit}/s within {p99_ms:g} ms ({span}{late})"
    result.now_rate = found.carried.get(start, 0.0)
    if chosen == start:
        result.why = f"the config's values stay: they carry {result.why}"
        return
    late_now = found.late.get(start, rate)
    now = f"the config's values are late at {late_now:.4g}/s"
    result.gain = {"low": round(rate / late_now, 3)} if late_now else {}
    if result.now_rate:
        result.gain["high"] = round(rate / result.now_rate, 3)
    result.why += f"; {now}"
    if not result.decided:
        result.chosen = start
        result.why += "; the bounds of the rate are too far apart to change the config, allow --budget-s more"
        return
    reason = f"carries {rate:.4g}/s within {p99_ms:g} ms ({span}); {now}"
    result.changes = changes_of(result.application, chosen, dict.fromkeys(REASONS, reason))
