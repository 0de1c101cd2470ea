"""The sequences of one key, and whose turn it is among keys.

Owns: who waits and who is ready within a key, and the deficit round robin between keys (Shreedhar and
Varghese, "Efficient Fair Queuing Using Deficit Round-Robin", 1996): what is shared out is time, so a
key whose steps are long gets fewer of them. Must not know: blocks, slots, units.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from deployments.engine.sequence import Sequence

LEAST_STEP_S = 1e-6
"""A step is never taken for shorter: on a clock too coarse to see it, keys still take turns."""
PRIORITY_AGING_S = 5.0
"""Waiting this long is worth one level of priority, as in the batcher: nobody starves."""


def rank(sequence: Sequence, now: float) -> tuple[int, int]:
    """Lower goes first: priority, improved by age, then arrival."""
    return (sequence.priority - int((now - sequence.arrived) / PRIORITY_AGING_S), sequence.serial)


class Lane:
    """One key's sequences. running_cost: of those with a slot, the held ones aside, so that slow readers
    keep nobody out. deficit_s: time it may still use."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.running: dict[Sequence, None] = {}
        self.ready: dict[Sequence, None] = {}  # running, with work, not held; who stepped goes last
        self.deficit_s = 0.0
        self._counted: set[Sequence] = set()  # whose cost is in running_cost
        self.running_cost = 0.0
        self._waiting: dict[int, OrderedDict[Sequence, None]] = {}  # by priority, oldest first

    def __len__(self) -> int:
        """Sequences that wait."""
        return sum(len(line) for line in self._waiting.values())

    @property
    def is_idle(self) -> bool:
        return not self.ready and not self._waiting

    @property
    def is_empty(self) -> bool:
        return not self.running and not self._waiting

    def waiting(self) -> Iterator[Sequence]:
        for line in self._waiting.values():
            yield from line

    def wait(self, sequence: Sequence, *, first: bool = False) -> None:
        """Join the line of its priority; `first`: it was preempted, and is older than who waits."""
        line = self._waiting.setdefault(sequence.priority, OrderedDict())
        line[sequence] = None
        if first:
            line.move_to_end(sequence, last=False)

    def leave(self, sequence: Sequence) -> None:
        """Out of the line."""
        line = self._waiting[sequence.priority]
        del line[sequence]
        if not line:
            del self._waiting[sequence.priority]

    def next(self, now: float) -> Sequence | None:
        """Who is to get the next slot: of each priority only its oldest can be."""
        heads = (next(iter(line)) for line in self._waiting.values())
        return min(heads, key=lambda head: rank(head, now), default=None)

    def start(self, sequence: Sequence) -> None:
        self.running[sequence] = None
        self._count(sequence)

    def stop(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.ready.pop(sequence, None)
        self._count_no_more(sequence)

    def refresh(self, sequence: Sequence) -> None:
        """Its work or its hold changed: a ready one keeps its place."""
        if sequence.is_held:
            self._count_no_more(sequence)
        else:
            self._count(sequence)
        if sequence.remaining > 0 and not sequence.is_held:
            self.ready.setdefault(sequence)
        else:
            self.ready.pop(sequence, None)

    def _count(self, sequence: Sequence) -> None:
        if sequence not in self._counted:
            self._counted.add(sequence)
            self.running_cost += sequence.cost

    def _count_no_more(self, sequence: Sequence) -> None:
        if sequence in self._counted:
            self._counted.remove(sequence)
            left = self.running_cost - sequence.cost
            self.running_cost = left if self._counted else 0.0  # no rounding stays


class Turns:
    """Which lane steps next. A lane is served while it has time left, then the next."""

    def __init__(self) -> None:
        self.lanes: dict[Hashable, Lane] = {}
        self._quantum_s = LEAST_STEP_S

    def lane(self, key: Hashable) -> Lane:
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key)
        return lane

    def in_order(self) -> list[Lane]:
        """Lanes with something to do, the one whose turn it is first."""
        active = [lane for lane in self.lanes.values() if not lane.is_idle]
        if len(active) > 1 and max(lane.deficit_s for lane in active) <= 0.0:
            rounds = 1 + int(min(-lane.deficit_s for lane in active) / self._quantum_s)
            for lane in active:
                lane.deficit_s += rounds * self._quantum_s
        return sorted(active, key=lambda lane: lane.deficit_s <= 0.0)  # stable: else in their round

    def charge(self, lane: Lane, elapsed_s: float) -> None:
        """The lane's step took that long. Alone, it owes nobody anything."""
        if all(other.is_idle for other in self.lanes.values() if other is not lane):
            lane.deficit_s = 0.0
        else:
            # A round gives each lane the longest step of late, so nobody waits for many rounds.
            elapsed_s = max(elapsed_s, LEAST_STEP_S)
            self._quantum_s = max(elapsed_s, 0.9 * self._quantum_s)
            # It owes a round at most: more comes only of time that those before it had no use for.
            lane.deficit_s = max(lane.deficit_s - elapsed_s, -self._quantum_s)
        if lane.deficit_s <= 0.0 and lane.key in self.lanes:
            self.lanes[lane.key] = self.lanes.pop(lane.key)  # to the end of the round
        self.prune(lane)

    def prune(self, lane: Lane) -> None:
        """Keys are the callers': an empty lane is forgotten."""
        if lane.is_empty:
            self.lanes.pop(lane.key, None)
