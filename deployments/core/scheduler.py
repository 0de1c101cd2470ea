"""Who enters, who waits, who goes next: every scheduling decision, as a function of state and time.

Sans-IO: no clock, thread, await or tensor in here; the caller passes `now` (monotonic seconds) and
runs the batches. Two rules above all: membership of a batch is fixed when a slot is free, never
earlier (late binding), and nobody waits while a slot is idle unless `batch_wait_ms` asks for it.

Order: priority (an item gains a level each PRIORITY_AGING_S, so nobody starves), then virtual start
time, so that a list in one request takes turns with other requests instead of going before them
(Parekh and Gallager, "A Generalized Processor Sharing Approach", 1993), then arrival.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

from deployments.core.contract import Limits
from deployments.core.errors import (
    DeadlinePassed,
    Draining,
    InvalidItem,
    Overloaded,
    RequestTooLarge,
)
from deployments.core.estimate import BatchTimeModel
from deployments.core.overload import OverloadControl
from deployments.core.submission import Example, Item, Result, Submission

PRIORITY_AGING_S = 5.0
"""Waiting this long is worth one level of priority; the default deadline of 30 s spans six."""
COST_AGE_BOUND_S = 1.0
"""From this age on, an item that does not fit closes the batch instead of being overtaken."""
QUEUE_BATCHES = 64
"""Default bound of the queue's cost, in full batches (CONTRACT: `max_queue_cost`)."""


@dataclass(slots=True, eq=False)
class Batch:
    """Items that run together; `expected_end` is in clock seconds."""

    items: list[Item]
    cost: float
    started: float = 0.0
    expected_end: float = 0.0


@dataclass(slots=True)
class Counters:
    """Totals since start, and what a moment's view needs."""

    submitted: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    batches: int = 0
    items_run: int = 0
    lowered_cost: float | None = field(default=None)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Who asks to be let in."""

    items: int
    cost: float
    timeout_s: float
    priority: int


class Scheduler:
    """The queue of one replica. Not thread-safe: one event loop owns it."""

    def __init__(self, limits: Limits, *, mates_by_cost: bool = False) -> None:
        self.limits = limits
        self.times = BatchTimeModel()
        self.counters = Counters()
        self.is_draining = False
        self._mates_by_cost = mates_by_cost
        self._overload = OverloadControl()
        self._waiting: dict[int, Item] = {}  # by serial, so in order of arrival
        self._waiting_cost = 0.0
        self._waiting_submissions = 0
        self._deadlines: list[tuple[float, int, Submission]] = []
        self._serials = itertools.count()
        self._virtual_time = 0.0
        self._running: list[Batch] = []
        self._lowered_cost = math.inf
        self._reserved = 0
        self._waiting_by_priority: Counter[int] = Counter()
        self._backlog_fill = float(limits.max_batch_size)
        self.prepare_item_s = 0.0

    # -- what a moment looks like ---------------------------------------------------------------

    @property
    def waiting_items(self) -> int:
        return len(self._waiting)

    @property
    def waiting_cost(self) -> float:
        return self._waiting_cost

    @property
    def reserved_items(self) -> int:
        """Items let in and still being preprocessed."""
        return self._reserved

    @property
    def running(self) -> Sequence[Batch]:
        return self._running

    @property
    def patience_s(self) -> float | None:
        """The clients' patience learned under overload, None while it plays no part."""
        return self._overload.patience_s

    @property
    def max_batch_cost(self) -> float:
        """The bound in force: the configured one, or lower once memory ran out above it."""
        limit = self.limits.max_batch_cost
        return min(math.inf if limit is None else limit, self._lowered_cost)

    def oldest_age_s(self, now: float) -> float:
        if not self._waiting:
            return 0.0
        return now - self._waiting[next(iter(self._waiting))].submission.arrived

    # -- entering --------------------------------------------------------------------------------

    def check_room(self, now: float, items: int, *, timeout_s: float, priority: int = 0) -> None:
        """Raise what `reserve` would raise, and reserve nothing."""
        self._check_door(items)
        self._check_wait(now, _Entry(items, 0.0, timeout_s, priority))

    def reserve(self, now: float, items: int, *, timeout_s: float, priority: int = 0) -> None:
        """Refuse early, before any work is spent on the items: raises Overloaded or Draining.

        Otherwise the items count as waiting while they are preprocessed: `submit` them with
        `reserved=items`, or `release` them where they end on the way.
        """
        self.check_room(now, items, timeout_s=timeout_s, priority=priority)
        self._reserved += items

    def release(self, items: int) -> None:
        self._reserved -= items

    def submit(
        self,
        examples: Sequence[Example],
        now: float,
        *,
        timeout_s: float,
        priority: int,
        on_done: Callable[[Submission], None],
        arrived: float | None = None,
        reserved: int = 0,
    ) -> Submission:
        """Queue all examples of one request, or raise and queue none.

        Examples too big for any batch get their InvalidItem at once; their mates are queued.
        Raises Overloaded, Draining, RequestTooLarge (a list that could never be held). With a
        reservation, which ends here, only a queue full by cost refuses. `timeout_s` counts from
        `arrived`, before preprocessing; None: now.
        """
        self._reserved -= reserved
        fitting = [i for i, e in enumerate(examples) if e.cost <= self._door_cost()]
        cost = sum(examples[i].cost for i in fitting)
        self._check_size(len(fitting), cost)
        if not reserved:
            self._check_door(len(fitting))
        if not reserved or self._waiting_cost + cost > self._max_queue_cost():
            self._check_wait(now, _Entry(len(fitting), cost, timeout_s, priority))
        since = now if arrived is None else arrived
        submission = Submission(examples, since, since + timeout_s, priority, on_done)
        self.counters.submitted += len(examples)
        tag = self._virtual_time
        for i in fitting:
            item = Item(submission, i, examples[i], tag, next(self._serials))
            tag += item.example.cost
            self._waiting[item.serial] = submission.waiting[i] = item
        if fitting:
            self._waiting_cost += cost
            self._waiting_submissions += 1
            self._waiting_by_priority[priority] += len(fitting)
            self._push_deadline(submission)
        self._refuse_oversized(submission, set(fitting))
        return submission

    def _push_deadline(self, submission: Submission) -> None:
        # Ended submissions are skipped when they surface; with long deadlines few do, so they are
        # swept out before they outnumber the living.
        if len(self._deadlines) > 2 * self._waiting_submissions + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2].waiting]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (submission.deadline, next(self._serials), submission))

    def _door_cost(self) -> float:
        limit = self.limits.max_batch_cost
        return math.inf if limit is None else limit

    def _refuse_oversized(self, submission: Submission, fitting: set[int]) -> None:
        for i, example in enumerate(submission.examples):
            if i not in fitting:
                message = (
                    f"this item costs {example.cost:g}, a batch holds {self._door_cost():g} at "
                    "most (max_batch_cost): send a smaller item"
                )
                submission.resolve(i, Result(error=InvalidItem(message)))

    def _check_door(self, items: int) -> None:
        if self.is_draining:
            raise Draining("this server is stopping; send the request to another", retry_after_s=1)
        self._check_size(items, 0.0)

    def _check_size(self, items: int, cost: float) -> None:
        if items > self.limits.max_queue_items or cost > self._max_queue_cost():
            raise RequestTooLarge(
                f"{items} items of cost {cost:g} never fit the queue ({self.limits.max_queue_items} "
                f"items, cost {self._max_queue_cost():g}): split the list",
                param="inputs",
            )

    def _check_wait(self, now: float, entry: "_Entry") -> None:
        has_room = (
            self.waiting_items + self._reserved + entry.items <= self.limits.max_queue_items
            and self._waiting_cost + entry.cost <= self._max_queue_cost()
        )
        is_idle = not self._waiting and not self._reserved and len(self._running) < self.limits.slots
        if is_idle and has_room:
            self._overload.on_slot_idle(now)
            return
        batch_s = self._full_batch_s()
        wait_s = self._wait_s(now, batch_s, entry.priority)
        allowed_s = self._allowed_wait_s(now, wait_s, batch_s, entry.timeout_s)
        if has_room and wait_s <= allowed_s:
            return
        self.counters.refused += entry.items
        retry_after_s = max(1, math.ceil(wait_s - (max(0.0, allowed_s) if has_room else 0.0)))
        raise Overloaded(
            f"no room within the allowed wait: {self.waiting_items} items are waiting, about "
            f"{wait_s:.2f} s; try again in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )

    def _max_queue_cost(self) -> float:
        if self.limits.max_queue_cost is not None:
            return self.limits.max_queue_cost
        if self.limits.max_batch_cost is None:
            return math.inf
        return QUEUE_BATCHES * self.limits.max_batch_cost

    def _allowed_wait_s(self, now: float, wait_s: float, batch_s: float, timeout_s: float) -> float:
        # Asking each time keeps the standing-queue clock running whichever bound applies.
        auto_s = self._overload.allowed_wait_s(now, batch_s)
        is_standing = self._overload.is_standing(now, batch_s)
        # An answer that comes after the caller's own deadline is work for nobody. While the server
        # keeps up the contract's word holds (begin in time); in a standing queue, ending counts.
        deadline_s = timeout_s - batch_s if is_standing and wait_s > 0.0 else timeout_s
        bound_s = auto_s if self.limits.max_queue_s is None else self.limits.max_queue_s
        return min(bound_s, deadline_s)

    def predicted_wait_s(self, now: float) -> float:
        """Until a newcomer would begin: preprocessing, slots' rest, and the batches ahead of it."""
        return self._wait_s(now, self._full_batch_s(), priority=0)

    def _wait_s(self, now: float, batch_s: float, priority: int) -> float:
        free_in_s = self._reserved * self.prepare_item_s
        if len(self._running) >= self.limits.slots:
            free_in_s += max(0.0, min(batch.expected_end for batch in self._running) - now)
        return free_in_s + self._batches_ahead(priority) * batch_s / self.limits.slots

    def _batches_ahead(self, priority: int) -> int:
        waiting = sum(n for level, n in self._waiting_by_priority.items() if level <= priority)
        by_items = int((waiting + self._reserved) // self._backlog_fill)
        limit = self.max_batch_cost
        if not waiting or not math.isfinite(limit):
            return by_items
        return max(by_items, int(self._waiting_cost * waiting / len(self._waiting) // limit))

    def _full_batch_s(self) -> float:
        """Seconds of a batch filled from what waits now, or of a full one of recent size."""
        if not self._waiting:
            return self.times.predict_s(0.0)
        mean_cost = self._waiting_cost / len(self._waiting)
        fill = min(self._backlog_fill, len(self._waiting))
        return self.times.predict_s(min(self.max_batch_cost, mean_cost * fill))

    # -- leaving without having run ---------------------------------------------------------------

    def cancel(self, submission: Submission, now: float) -> None:
        """The client left: what waits leaves the queue now, what runs is computed for nobody."""
        submission.cancelled = True
        self._overload.on_give_up(now, now - submission.arrived, self._full_batch_s())
        self.counters.cancelled += len(submission.waiting)
        self._forget_waiting(submission)

    def expire(self, now: float) -> None:
        """Fail what has not begun by its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now:
            submission = heapq.heappop(self._deadlines)[2]
            late = list(submission.waiting)
            self._forget_waiting(submission)
            self.counters.expired += len(late)
            error = DeadlinePassed(
                f"not begun within {1e3 * (submission.deadline - submission.arrived):.0f} ms: "
                "allow more time (timeout_ms), or send less"
            )
            for index in late:
                submission.resolve(index, Result(error=copy(error)))

    def next_deadline(self) -> float | None:
        """When `expire` must be called next; ended submissions are skipped."""
        while self._deadlines and not self._deadlines[0][2].waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _forget_waiting(self, submission: Submission) -> None:
        for item in list(submission.waiting.values()):
            self._take(item)

    def _take(self, item: Item) -> None:
        """Remove `item` from the queue, whatever becomes of it."""
        del self._waiting[item.serial]
        del item.submission.waiting[item.index]
        self._waiting_cost -= item.example.cost
        level = item.submission.priority
        self._waiting_by_priority[level] -= 1
        if not self._waiting_by_priority[level]:
            del self._waiting_by_priority[level]
        if not item.submission.waiting:
            self._waiting_submissions -= 1
        if not self._waiting:
            self._waiting_cost = 0.0  # no drift from float sums

    # -- running ------------------------------------------------------------------------------------

    def ready_at(self, now: float) -> float | None:
        """When the next batch may start: now, later (`batch_wait_ms`), or None without work."""
        if not self._waiting:
            return None
        if self.limits.batch_wait_ms == 0.0 or self.is_draining or self._fills_a_batch():
            return now
        oldest = self._waiting[next(iter(self._waiting))].submission.arrived
        return max(now, oldest + self.limits.batch_wait_ms / 1e3)

    def _fills_a_batch(self) -> bool:
        return len(self._waiting) >= self.limits.max_batch_size or self._waiting_cost >= self.max_batch_cost

    def form_batch(self, now: float) -> Batch | None:
        """Take the next batch out of the queue; None without work. Only call with a slot free."""
        self.expire(now)
        if not self._waiting:
            return None
        ordered = self._ordered(now)
        batch = self._fill(ordered, now)
        share = max(1, self._waiting_submissions)
        for item in batch.items:
            # Virtual time runs at the rate each waiting request is served: what is served, shared
            # among all that wait. Newcomers start there, so nobody is overtaken for ever.
            self._virtual_time = max(self._virtual_time, item.tag)
            self._take(item)
        self._virtual_time += batch.cost / share
        if not self._waiting:
            self._overload.on_queue_empty(now)
        else:
            # How full batches really get: with many keys far below max_batch_size.
            self._backlog_fill += 0.2 * (len(batch.items) - self._backlog_fill)
        return batch

    def _ordered(self, now: float) -> list[Item]:
        items = list(self._waiting.values())
        if self._overload.prefers_newest(now, self.oldest_age_s(now), self._full_batch_s()):
            items.sort(key=lambda item: (item.submission.priority, -item.serial))
            return items

        def rank(item: Item) -> tuple[int, float, int]:
            age_s = now - item.submission.arrived
            level = item.submission.priority - int(age_s / PRIORITY_AGING_S)
            return (level, item.tag, item.serial)

        items.sort(key=rank)  # nearly sorted already: linear for one priority and no lists
        return items

    def _fill(self, ordered: list[Item], now: float) -> Batch:
        head, limit = ordered[0], self.max_batch_cost
        chosen, cost = [head], head.example.cost
        mates = [item for item in ordered[1:] if item.example.key == head.example.key]
        if self._mates_by_cost:
            mates.sort(key=lambda item: abs(item.example.cost - head.example.cost))
        for item in mates:
            if len(chosen) >= self.limits.max_batch_size:
                break
            if cost + item.example.cost <= limit:
                chosen.append(item)
                cost += item.example.cost
            elif now - item.submission.arrived >= COST_AGE_BOUND_S:
                break  # age beats cost: nobody smaller goes before it any more
        return Batch(chosen, cost)

    def start(self, batch: Batch, now: float) -> None:
        """The batch has its slot."""
        batch.started = now
        batch.expected_end = now + self.times.predict_s(batch.cost)
        self._running.append(batch)
        self.counters.batches += 1
        self.counters.items_run += len(batch.items)
        for item in batch.items:
            item.submission.began = now
            item.submission.batch_items = len(batch.items)

    def drop_ended(self, batch: Batch, now: float) -> int:
        """Take out of a batch formed ahead (staged) who left or is late; how many that were."""
        kept = []
        for item in batch.items:
            if item.submission.cancelled:
                self.counters.cancelled += 1
            elif item.submission.deadline <= now:
                self.counters.expired += 1
                error = DeadlinePassed("not begun within the time allowed (timeout_ms)")
                item.submission.resolve(item.index, Result(error=error))
            else:
                kept.append(item)
        dropped = len(batch.items) - len(kept)
        batch.items = kept
        batch.cost = sum(item.example.cost for item in kept)
        return dropped

    def free_slot(self, batch: Batch, now: float, *, is_representative: bool = True) -> None:
        """The model is done with `batch`. A run that failed or was split teaches no timing."""
        self._running.remove(batch)
        if is_representative:
            self.times.observe(batch.cost, now - batch.started)

    def finish(self, batch: Batch, results: Sequence[Result], now: float, *, model_s: float = 0.0) -> None:
        """Hand out the results, one an item, in order."""
        self._overload.on_answered(now, len(results))
        for item, result in zip(batch.items, results, strict=True):
            item.submission.model_s = model_s
            item.submission.resolve(item.index, result)

    def lower_max_cost(self, failed_cost: float) -> None:
        """Memory ran out at `failed_cost`: later batches stay at half of it."""
        self._lowered_cost = min(self._lowered_cost, max(1.0, failed_cost / 2))
        self.counters.lowered_cost = self._lowered_cost
