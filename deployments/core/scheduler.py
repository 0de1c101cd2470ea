"""Who waits and who goes next: every scheduling decision, as a function of state and time.

Sans-IO: no clock, thread, await or tensor in here; the caller passes `now` (monotonic seconds) and
runs the batches. Two rules above all: membership of a batch is fixed when a slot is free, never
earlier (late binding), and nobody waits while a slot is idle unless `batch_wait_ms` asks for it.

Order: priority (an item gains a level each PRIORITY_AGING_S, so nobody starves), then virtual start
time, so that a list in one request takes turns with other requests instead of going before them
(Parekh and Gallager, "A Generalized Processor Sharing Approach", 1993), then arrival.
Who is let in at all is decided in admission.py.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

from deployments.core.admission import Admission, Entry
from deployments.core.contract import Limits
from deployments.core.errors import DeadlinePassed, InvalidItem
from deployments.core.submission import Batch, Example, Item, Result, Submission
from deployments.core.waiting import Waiting

PRIORITY_AGING_S = 5.0
"""Waiting this long is worth one level of priority; the default deadline of 30 s spans six."""
COST_AGE_BOUND_S = 1.0
"""From this age on, an item that does not fit closes the batch instead of being overtaken."""


@dataclass(slots=True)
class Counters:
    """Items since start that left the queue without having run."""

    expired: int = 0
    cancelled: int = 0


class Scheduler:
    """The queue of one replica. Not thread-safe: one event loop owns it.

    mates_by_cost: batch-mates of like cost first. in_order: nobody is overtaken, whatever its priority.
    """

    def __init__(self, limits: Limits, *, mates_by_cost: bool = False, in_order: bool = False) -> None:
        self.counters = Counters()
        self.waiting = Waiting()
        self._running: list[Batch] = []
        self.admission = Admission(limits, self.waiting, self._running)
        self._mates_by_cost, self._in_order = mates_by_cost, in_order
        self._virtual_time = 0.0

    @property
    def limits(self) -> Limits:
        return self.admission.limits

    @property
    def running(self) -> Sequence[Batch]:
        return self._running

    def oldest_age_s(self, now: float) -> float:
        return now - self.waiting.oldest.submission.arrived if len(self.waiting) else 0.0

    # -- entering --------------------------------------------------------------------------------

    def check_room(self, now: float, items: int, *, timeout_s: float, priority: int = 0) -> None:
        """Raise what `reserve` would raise, and reserve nothing."""
        self.admission.check_open()
        self.admission.check_size(items, 0.0)
        self.admission.check_wait(now, Entry(items, 0.0, timeout_s, priority))

    def reserve(self, now: float, items: int, *, timeout_s: float, priority: int = 0) -> None:
        """Refuse early, before any work is spent on the items: raises Overloaded or Draining.

        Otherwise the items count as waiting while they are preprocessed: `submit` them with
        `reserved=items`, or `release` them where they end on the way.
        """
        self.check_room(now, items, timeout_s=timeout_s, priority=priority)
        self.waiting.reserved += items

    def release(self, items: int) -> None:
        self.waiting.reserved -= items

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
        self.waiting.reserved -= reserved
        fitting = [i for i, e in enumerate(examples) if e.cost <= self.admission.door_cost]
        cost = sum(examples[i].cost for i in fitting)
        if not reserved:
            self.admission.check_open()
        self.admission.check_size(len(fitting), cost)
        if not reserved or self.waiting.cost + cost > self.admission.max_queue_cost:
            self.admission.check_wait(now, Entry(len(fitting), cost, timeout_s, priority))
        since = now if arrived is None else arrived
        submission = Submission(examples, since, since + timeout_s, priority, on_done)
        self.waiting.add(submission, fitting, self._virtual_time)
        if len(fitting) < len(examples):
            self._refuse_oversized(submission, set(fitting))
        return submission

    def _refuse_oversized(self, submission: Submission, fitting: set[int]) -> None:
        for i, example in enumerate(submission.examples):
            if i not in fitting:
                message = (
                    f"this item costs {example.cost:g}, a batch holds {self.admission.door_cost:g} at "
                    "most (max_batch_cost): send a smaller item"
                )
                submission.resolve(i, Result(error=InvalidItem(message)))

    # -- leaving without having run ---------------------------------------------------------------

    def cancel(self, submission: Submission, now: float) -> None:
        """The client left: what waits leaves the queue now, what runs is computed for nobody."""
        submission.cancelled = True
        batch_s = self.admission.full_batch_s(now)
        costs = [example.cost for example in submission.examples]
        alone_s = self.admission.times.predict_s(min(costs, default=0.0))
        self.admission.overload.on_give_up(now, now - submission.arrived, batch_s, alone_s)
        self.counters.cancelled += len(self.waiting.take_all(submission))

    def expire(self, now: float) -> None:
        """Fail what has not begun by its deadline."""
        while (submission := self.waiting.pop_late(now)) is not None:
            error = DeadlinePassed(
                f"not begun within {1e3 * (submission.deadline - submission.arrived):.0f} ms: "
                "allow more time (timeout_ms), or send less"
            )
            late = self.waiting.take_all(submission)
            self.counters.expired += len(late)
            for index in late:
                submission.resolve(index, Result(error=copy(error)))

    def next_deadline(self) -> float | None:
        """When `expire` must be called next."""
        return self.waiting.next_deadline()

    # -- running ------------------------------------------------------------------------------------

    def ready_at(self, now: float) -> float | None:
        """When the next batch may start: now, later (`batch_wait_ms`), or None without work."""
        if not len(self.waiting):
            return None
        if self.limits.batch_wait_ms == 0.0 or self.admission.is_draining or self._fills_a_batch():
            return now
        oldest = self.waiting.oldest.submission.arrived
        return max(now, oldest + self.limits.batch_wait_ms / 1e3)

    def _fills_a_batch(self) -> bool:
        return (
            len(self.waiting) >= self.limits.max_batch_size
            or self.waiting.cost >= self.admission.max_batch_cost
        )

    def form_batch(self, now: float) -> Batch | None:
        """Take the next batch out of the queue; None without work. Only call with a slot free."""
        self.expire(now)
        if not len(self.waiting):
            return None
        batch = self._fill(self._ordered(now), now)
        share = max(1, self.waiting.submissions)
        for item in batch.items:
            # Virtual time runs at the rate each waiting request is served: what is served, shared
            # among all that wait. Newcomers start there, so nobody is overtaken for ever.
            self._virtual_time = max(self._virtual_time, item.tag)
            self.waiting.take(item)
        self._virtual_time += batch.cost / share
        self.admission.on_batch_formed(now, len(batch.items))
        return batch

    def _ordered(self, now: float) -> list[Item]:
        items = list(self.waiting)  # by arrival
        if self._in_order:
            return items
        batch_s = self.admission.full_batch_s(now)
        if self.admission.overload.prefers_newest(now, self.oldest_age_s(now), batch_s):
            items.sort(key=lambda item: (item.submission.priority, -item.serial))
            return items

        def rank(item: Item) -> tuple[int, float, int]:
            age_s = now - item.submission.arrived
            level = item.submission.priority - int(age_s / PRIORITY_AGING_S)
            return (level, item.tag, item.serial)

        items.sort(key=rank)  # nearly sorted already: linear for one priority and no lists
        return items

    def _fill(self, ordered: list[Item], now: float) -> Batch:
        head = ordered[0]
        limit = self.admission.cost_limit(now, head.submission.deadline - head.submission.arrived)
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
        batch.expected_end = now + self.admission.times.predict_s(batch.cost)
        self._running.append(batch)
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
            self.admission.times.observe(batch.cost, now - batch.started)

    def finish(self, batch: Batch, results: Sequence[Result], now: float, *, model_s: float = 0.0) -> None:
        """Hand out the results, one an item, in order."""
        self.admission.overload.on_answered(now, len(results))
        for item, result in zip(batch.items, results, strict=True):
            item.submission.model_s = model_s
            item.submission.resolve(item.index, result)
