"""Which setting is best: one key after the other, short looks at many, longer ones at the few that lead.

Owns: the order of looks, who drops out, when a curve is flat, the budget. Must not know: processes, torch,
YAML. Looks of all that are compared take turns (A B A B), so that a machine that drifts hits all alike.
Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification", AISTATS 2016 (successive halving).
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from scripts.tune.certainty import Ratio, ratio
from scripts.tune.points import CouldNotRun, Curve, Look, OutOfBudget, Point, Shape

LOOK_S = 0.5
"""Of one look, once batches are full: they are long or short against it, the edges count by their parts."""
FLAT = 0.02
"""Of two settings that are no further apart the simpler one is chosen: less memory, less latency."""
NEARLY = 0.88
"""Of the best of a curve: large enough to compare slots and threads with, and its looks are short."""
RISING = 1.06
"""Two doublings of the batch that together gain less than this end the curve."""
BEHIND = (0.80, 0.88, 0.92, 0.94)
"""After so many rounds, who is below this part of the leader drops out: a look's own noise is 5 to 10 % on a
shared machine, and shrinks with the root of the rounds."""
ROUNDS = 4
CONFIRM_ROUNDS = 9
SURE_ROUNDS = 3
"""An interval of two pairs is too wide to say anything."""
LEAST_ROUNDS = 4
CLEARLY = 1.10
"""Replicas double the memory and the processes: less than this isn't worth it."""
MOST_SLOTS = 4
"""Or twice the CPUs: more batches at once than that only wait, unless the model does nothing but wait."""
RESERVE = 0.2
"""Of the budget, for the last comparison: of the choice with what the config says now."""

Measure = Callable[[Point, float], Look]
Say = Callable[[str], None]


class Budget:
    """Seconds that may be spent. clock: monotonic."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock, self._began = clock, clock()
        self.reserve_s = RESERVE * seconds

    @property
    def spent_s(self) -> float:
        return self._clock() - self._began

    def need(self, seconds: float) -> None:
        """Raise OutOfBudget where so much isn't left beside the reserve."""
        if self.spent_s + seconds > self.seconds - self.reserve_s:
            raise OutOfBudget


@dataclass(slots=True)
class Race:
    """Looks of a race: for each point its values, of the rounds in which it ran."""

    values: dict[Point, list[float]] = field(default_factory=dict)

    def over(self, these: Point, those: Point) -> Ratio:
        """How much better `these` are, by the rounds that both ran in."""
        pairs = min(len(self.values[these]), len(self.values[those]))
        return ratio(self.values[these][:pairs], self.values[those][:pairs])

    def leader(self) -> Point:
        """Of those that stayed longest, the best."""
        rounds = max(len(values) for values in self.values.values())
        alive = [point for point, values in self.values.items() if len(values) == rounds]
        return max(alive, key=lambda point: statistics.fmean(map(math.log, self.values[point])))

    def simplest(self) -> Point:
        """The first in the order given that is as good as the leader."""
        leader = self.leader()
        return next(p for p in self.values if self.over(p, leader).times >= 1.0 - FLAT or p == leader)


class Search:
    """Measures through `measure`; keeps all looks. value: what is to be large, of a look."""

    def __init__(
        self,
        measure: Measure,
        budget: Budget,
        say: Say,
        *,
        value: Callable[[Look], float] = lambda look: look.rate,
        look_s: float = LOOK_S,
    ) -> None:
        self._measure, self._budget, self._say, self._value = measure, budget, say, value
        self._look_s, self._took_s = look_s, look_s
        self.looks: dict[Point, list[Look]] = {}

    def look(self, point: Point) -> Look:
        """One look, kept. Raises OutOfBudget."""
        self._budget.need(self._took_s)
        began = self._budget.spent_s
        found = self.measured(point, self._look_s)
        self._took_s = self._budget.spent_s - began
        return found

    def measured(self, point: Point, seconds: float) -> Look:
        """A look of so many seconds, kept; whatever the budget is."""
        found = self._measure(point, seconds)
        self.looks.setdefault(point, []).append(found)
        return found

    def value_of(self, point: Point) -> float:
        return max(1e-9, self._value(self.look(point)))

    def climb(self, start: Point, batches: Sequence[int]) -> Point:
        """Along the batch sizes, upwards, until two in a row gain nothing; the smallest good one.

        Raises OutOfBudget, unless two sizes are known by then.
        """
        values: dict[Point, float] = {}
        for batch in batches:
            point = start.with_batch(batch)
            try:
                values[point] = self.value_of(point)
            except OutOfBudget:
                if len(values) < 2:
                    raise
                break
            except CouldNotRun as error:  # smaller ones could: it is the size
                if not values:
                    raise
                self._say(f"batch {batch} can't be measured: {error}")
                break
            self._say(f"batch {batch}: {self._text(point)}")
            if self.looks[point][-1].ran_out:
                del values[point]
                break
            *before, one, two = [0.0, 0.0, *values.values()]
            if max(one, two) < RISING * max(before, default=0.0):
                self._say(f"the curve is flat from {batch // 4} on")
                break
        top = max(values.values())
        return next(point for point, value in values.items() if value >= NEARLY * top)

    def race(self, points: Sequence[Point], rounds: int = ROUNDS) -> Race:
        """All in turns, forth and back; who is behind drops out. points: the simplest first.

        A budget that ends it leaves what whole rounds there were; raises OutOfBudget without one.
        """
        race = Race({point: [] for point in points})
        alive = list(points)
        for number in range(rounds):
            found: dict[Point, float] = {}
            try:
                for point in alive if number % 2 == 0 else reversed(alive):
                    found[point] = self.value_of(point)
            except OutOfBudget:
                if number == 0:
                    raise
                break
            for point, value in found.items():
                race.values[point].append(value)
            if number == 0:
                for point in points:
                    self._say(f"{point.shape.text()}, batch {point.batch}: {self._text(point)}")
            alive = _still_in(race, alive, number)
            leader = race.leader()
            if len(alive) == 1 or (number + 1 >= SURE_ROUNDS and _is_decided(race, alive, leader)):
                break
        return race

    def compare(self, these: Point, those: Point) -> Ratio:
        """In turns until one is surely better, or they are surely the same, or the rounds are over.

        Uses the reserve. Raises OutOfBudget where there is no time for two looks at each.
        """
        self._budget.reserve_s = 0.0
        race = Race({these: [], those: []})
        for number in range(CONFIRM_ROUNDS):
            order = (these, those) if number % 2 == 0 else (those, these)
            try:
                found = {point: self.value_of(point) for point in order}
            except OutOfBudget:
                if number < 2:
                    raise
                break
            for point, value in found.items():
                race.values[point].append(value)
            if number + 1 >= LEAST_ROUNDS:
                sure = race.over(these, those)
                if sure.is_better or sure.is_worse or sure.is_flat(0.03):
                    break
        return race.over(these, those)

    def _text(self, point: Point) -> str:
        look = self.looks[point][-1]
        p99 = f", p99 {look.p99_ms:.0f} ms" if look.p99_ms else ""
        return f"{look.rate:.4g} a second (batches of {look.size:.1f}{p99})"

    def curve(self, key: str, points: Sequence[Point]) -> Curve:
        """The median looks along a key, of those of `points` that were looked at."""
        found = Curve(key)
        for point in points:
            for look in self.looks.get(point, ()):
                found.add(getattr(point, key), look.rate)
        return found


def _still_in(race: Race, alive: Sequence[Point], number: int) -> list[Point]:
    """Who is not behind by more than noise explains; the second stays a little longer, so that how far it is
    behind is known, too."""
    leader = race.leader()
    times = {point: race.over(point, leader).times for point in alive}
    second = max((times[point] for point in alive if point != leader), default=0.0)
    bound = BEHIND[min(number, len(BEHIND) - 1)]
    if number + 1 < SURE_ROUNDS:
        bound = min(bound, second)
    return [point for point in alive if times[point] >= bound]


def _is_decided(race: Race, alive: Sequence[Point], leader: Point) -> bool:
    """The leader is surely ahead, or surely level with all others."""
    others = [race.over(leader, point) for point in alive if point != leader]
    return all(one.is_better or one.is_flat(0.03) for one in others)


def neighbours(shape: Shape, cpus: int, *, may_share: bool, waits: bool, is_gpu: bool = False) -> list[Shape]:
    """Shapes one step away that may be faster: the same threads in all in twice or half the slots, and less
    or more threads. waits: CPUs are left idle, so more slots than CPUs are worth a look.
    """
    slots, threads = shape.slots, shape.threads
    found: list[tuple[int, int]] = []
    if may_share:
        found.append((2 * slots, threads if is_gpu else max(1, threads // 2)))
        if slots > 1:
            found.append((slots // 2, threads if is_gpu else 2 * threads))
    if not is_gpu:
        found.append((slots, 2 * threads))
        if not may_share or slots > 1 or threads > 2:  # otherwise two slots of one thread use them all
            found.append((slots, threads // 2))
    most = max(MOST_SLOTS, 2 * cpus) if waits or is_gpu else cpus
    return [
        replace(shape, slots=s, threads=t)
        for s, t in dict.fromkeys(found)
        if 1 <= s <= most and t >= 1 and (s * t <= max(cpus, s) or is_gpu)
    ]
