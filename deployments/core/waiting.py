"""The items that wait: by arrival, by priority, by deadline, and what they cost together.

Owns: the sums and indexes, each kept in step with the items by `add` and `take` alone. Must not know:
who is let in, who goes next.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from deployments.core.submission import Item, Submission


class Waiting:
    """reserved: items let in that are still being preprocessed."""

    def __init__(self) -> None:
        self.cost = 0.0
        self.submissions = 0
        self.reserved = 0
        self._items: dict[int, Item] = {}  # by serial, so in order of arrival
        self._by_priority: Counter[int] = Counter()
        self._deadlines: list[tuple[float, int, Submission]] = []
        self._serials = itertools.count()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """In order of arrival."""
        return iter(self._items.values())

    @property
    def oldest(self) -> Item:
        """Only call with somebody waiting."""
        return next(iter(self))

    def at_or_before(self, priority: int) -> int:
        """How many wait at this level or a better (lower) one."""
        return sum(count for level, count in self._by_priority.items() if level <= priority)

    def add(self, submission: Submission, indexes: Sequence[int], tag: float) -> None:
        """Queue these examples of `submission`; the first starts at virtual time `tag`."""
        for index in indexes:
            example = submission.examples[index]
            item = Item(submission, index, example, tag, next(self._serials))
            self._items[item.serial] = submission.waiting[index] = item
            self.cost += example.cost
            tag += example.cost
        if indexes:
            self.submissions += 1
            self._by_priority[submission.priority] += len(indexes)
            self._push_deadline(submission)

    def take(self, item: Item) -> None:
        """Remove `item`, whatever becomes of it."""
        submission = item.submission
        del self._items[item.serial]
        del submission.waiting[item.index]
        self.cost -= item.example.cost
        self._by_priority[submission.priority] -= 1
        if not self._by_priority[submission.priority]:
            del self._by_priority[submission.priority]
        if not submission.waiting:
            self.submissions -= 1
        if not self._items:
            self.cost = 0.0  # no drift from float sums

    def take_all(self, submission: Submission) -> list[int]:
        """Remove what waits of `submission`; the indexes of those items."""
        indexes = list(submission.waiting)
        for index in indexes:
            self.take(submission.waiting[index])
        return indexes

    def _push_deadline(self, submission: Submission) -> None:
        # Ended submissions are skipped when they surface; with long deadlines few do, so they are
        # swept out before they outnumber the living.
        if len(self._deadlines) > 2 * self.submissions + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2].waiting]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (submission.deadline, next(self._serials), submission))

    def next_deadline(self) -> float | None:
        """The earliest of those that wait; None without any."""
        while self._deadlines and not self._deadlines[0][2].waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def pop_late(self, now: float) -> Submission | None:
        """A submission whose deadline is past, with items that still wait; None without any."""
        deadline = self.next_deadline()
        if deadline is None or deadline > now:
            return None
        return heapq.heappop(self._deadlines)[2]
