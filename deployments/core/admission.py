"""Who is let in: bounds of the queue, and the predicted wait against what is allowed.

Sans-IO like the scheduler it belongs to: state and `now` in, a refusal or nothing out. Owns: every
reason to answer 503 before any work is spent, and the predictions behind `Retry-After`. Must not
know: who goes next. See docs/decisions/0002.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.core.contract import Limits
from deployments.core.cost_limit import CostLimit
from deployments.core.errors import Draining, Overloaded, RequestTooLarge
from deployments.core.estimate import BatchTimeModel
from deployments.core.overload import HEADROOM, OverloadControl
from deployments.core.submission import Batch
from deployments.core.waiting import Waiting

QUEUE_BATCHES = 64
"""Default bound of the queue's cost, in full batches (CONTRACT: `max_queue_cost`)."""
BATCH_SHARE = 1 / 3
"""In a standing queue a batch takes at most this share of the time a client gives us: the rest is for
waiting behind the batch that runs. Longer batches would be full, and late."""
FILL_MEMORY = 0.8
"""Weight of the past in how full batches get under a backlog."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Who asks to be let in. timeout_s: until its work must have begun."""

    items: int
    cost: float
    timeout_s: float
    priority: int


class Admission:
    """The door of one queue. prepare_item_s: what an item in preprocessing adds to the wait.

    slots: that can run a batch now; a pool grows, and an instance may be under repair.
    """

    def __init__(self, limits: Limits, waiting: Waiting, running: Sequence[Batch]) -> None:
        self.limits = limits
        self.times = BatchTimeModel()
        self.overload = OverloadControl()
        self.is_draining = False
        self.prepare_item_s = 0.0
        self.refused_items = 0
        self._waiting = waiting
        self._running = running
        self._backlog_fill = float(limits.max_batch_size)
        self.memory = CostLimit()
        self.slots = limits.slots

    @property
    def door_cost(self) -> float:
        """What one item may cost at most."""
        limit = self.limits.max_batch_cost
        return math.inf if limit is None else limit

    @property
    def max_batch_cost(self) -> float:
        """The bound in force: the configured one, or lower where memory says so."""
        return min(self.door_cost, self.memory.value)

    def on_batch_formed(self, now: float, items: int) -> None:
        """Learn how full batches really get; with many keys that is far below max_batch_size."""
        if len(self._waiting):
            self._backlog_fill += (1.0 - FILL_MEMORY) * (items - self._backlog_fill)
        else:
            self.overload.on_queue_empty(now)

    # -- the door -----------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.is_draining:
            raise Draining("this server is stopping; send the request to another", retry_after_s=1)

    def check_size(self, items: int, cost: float) -> None:
        """Raise RequestTooLarge for what an empty queue could not hold."""
        if items > self.limits.max_queue_items or cost > self.max_queue_cost:
            raise RequestTooLarge(
                f"{items} items of cost {cost:g} never fit the queue ({self.limits.max_queue_items} "
                f"items, cost {self.max_queue_cost:g}): split the list",
                param="inputs",
            )

    def check_wait(self, now: float, entry: Entry) -> None:
        """Raise Overloaded where there is no room, or none within the wait allowed to `entry`."""
        waiting = self._waiting
        has_room = (
            len(waiting) + waiting.reserved + entry.items <= self.limits.max_queue_items
            and waiting.cost + entry.cost <= self.max_queue_cost
        )
        is_idle = not len(waiting) and not waiting.reserved and len(self._running) < self.slots
        if is_idle and has_room:
            self.overload.on_slot_idle(now)
            return
        batch_s = self.full_batch_s(now, entry.timeout_s)
        wait_s = self._wait_s(now, batch_s, entry.priority)
        allowed_s = self._allowed_wait_s(now, wait_s, batch_s, entry.timeout_s)
        if has_room and wait_s <= allowed_s:
            return
        self.refused_items += entry.items
        self.overload.on_refused(now)
        retry_after_s = max(1, math.ceil(wait_s - (max(0.0, allowed_s) if has_room else 0.0)))
        raise Overloaded(
            f"no room within the allowed wait: {len(waiting)} items are waiting, about "
            f"{wait_s:.2f} s; try again in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )

    @property
    def max_queue_cost(self) -> float:
        if self.limits.max_queue_cost is not None:
            return self.limits.max_queue_cost
        return QUEUE_BATCHES * self.door_cost

    def _allowed_wait_s(self, now: float, wait_s: float, batch_s: float, timeout_s: float) -> float:
        # Asking each time keeps the standing-queue clock running whichever bound applies.
        auto_s = self.overload.allowed_wait_s(now, batch_s)
        is_standing = self.overload.is_standing(now, batch_s)
        # An answer that comes after the caller's own deadline is work for nobody. While the server
        # keeps up the contract's word holds (begin in time); in a standing queue, ending counts.
        deadline_s = HEADROOM * timeout_s - batch_s if is_standing and wait_s > 0.0 else timeout_s
        bound_s = auto_s if self.limits.max_queue_s is None else self.limits.max_queue_s
        return min(bound_s, deadline_s)

    # -- predictions ----------------------------------------------------------------------------------

    def predicted_wait_s(self, now: float, priority: int = 0) -> float:
        """Until a newcomer would begin: preprocessing, slots' rest, and the batches ahead of it."""
        return self._wait_s(now, self.full_batch_s(now), priority)

    def _wait_s(self, now: float, batch_s: float, priority: int) -> float:
        free_in_s = self._waiting.reserved * self.prepare_item_s
        if len(self._running) >= self.slots:
            ends = min((batch.expected_end for batch in self._running), default=now)
            free_in_s += max(0.0, ends - now)
        return free_in_s + self._batches_ahead(priority) * batch_s / max(1, self.slots)

    def _batches_ahead(self, priority: int) -> int:
        ahead = self._waiting.at_or_before(priority)
        by_items = int((ahead + self._waiting.reserved) // self._backlog_fill)
        limit = self.max_batch_cost
        if not ahead or not math.isfinite(limit):
            return by_items
        return max(by_items, int(self._waiting.cost * ahead / len(self._waiting) // limit))

    def full_batch_s(self, now: float, budget_s: float = math.inf) -> float:
        """Seconds of a batch filled from what waits now, for clients that give us `budget_s`."""
        waiting = len(self._waiting)
        if not waiting:
            return self.times.predict_s(0.0)
        fill = min(self._backlog_fill, waiting)
        cost = min(self.max_batch_cost, self._waiting.cost / waiting * fill)
        batch_s = self.times.predict_s(cost)
        return self.times.predict_s(min(cost, self._timely_cost(now, budget_s, batch_s)))

    def cost_limit(self, now: float, budget_s: float) -> float:
        """What the next batch may cost: memory's bound, and in a standing queue also time's."""
        return min(self.max_batch_cost, self._timely_cost(now, budget_s, self.full_batch_s(now)))

    def _timely_cost(self, now: float, budget_s: float, batch_s: float) -> float:
        patience_s = self.overload.patience_s
        budget_s = budget_s if patience_s is None else min(budget_s, patience_s)
        if not self.overload.is_standing(now, batch_s):
            return math.inf
        return self.times.cost_within(BATCH_SHARE * budget_s)
