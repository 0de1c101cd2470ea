"""How long may a newcomer wait? The `auto` of `max_queue_s`.

Clients that give up without having said when are what turns an overloaded queue stale: every item
reaches the model just after its client left. So while a queue stands, the ages at which clients give
up are watched; once give-ups are a real share of what ends, nobody is let in who would wait longer
than those clients do, and while items are waiting that can't make it any more, the newest go first.
Without give-ups clients are taken at their word: they wait.

Owns: the standing-queue state and the learned patience. Must not know: items, slots, HTTP.
Source: Maurer, "Fail at Scale", ACM Queue 2015 (controlled delay, adaptive LIFO); Nichols and
Jacobson, "Controlling Queue Delay", ACM Queue 2012 (a standing queue is one that never empties).
"""

from collections import deque

STANDING_AFTER_S = 0.1
"""A queue that no batch has emptied for this long stands (Maurer's N; a batch if that is longer)."""
FORGET_AFTER_S = 3.0
"""So long without a standing queue, and what was learned of the clients' patience is forgotten."""
IDLE_FORGETS_AFTER_S = 1.0
"""The same at once where a slot is idle, if the last refusal or give-up is this long ago."""
WINDOW_S = 2.0
"""Give-ups and answers are weighed over this window."""
GIVE_UP_SHARE = 0.1
"""Below this share of all ends, give-ups are people closing tabs, not a sign of overload."""
GIVE_UP_SPAN_S = 0.5
"""Give-ups must be spread over this long: many at one instant are one program that was stopped."""
PATIENCE_QUANTILE = 0.1
"""The patience that is planned for: nine of ten clients who left had waited longer."""
HEADROOM = 0.8
"""Of the learned patience, what waiting and running may take; the rest is network and estimate error."""
PATIENT_WAIT_S = 5.0
"""What a newcomer may wait in a standing queue when nobody gives up (8 batches if those are longer)."""


class OverloadControl:
    """Fed by the scheduler; answers `allowed_wait_s` and `prefers_newest`. Times in clock seconds."""

    def __init__(self) -> None:
        self._last_empty: float | None = None
        self._standing_until = float("-inf")
        self._last_sign = float("-inf")  # of overload: a refusal, a client that gave up
        self._gave_up: deque[tuple[float, float]] = deque(maxlen=512)  # (when, age)
        self._answered: deque[tuple[float, int]] = deque(maxlen=512)  # (when, items)
        self.patience_s: float | None = None

    def on_queue_empty(self, now: float) -> None:
        """Call whenever forming a batch has left nobody waiting."""
        self._last_empty = now

    def on_slot_idle(self, now: float) -> None:
        """Call when a newcomer finds a slot free and nobody waiting: there is no overload."""
        self._last_empty = now
        # With several slots one can be idle for a moment in the midst of an overload.
        if now - self._last_sign > IDLE_FORGETS_AFTER_S:
            self.patience_s = None
            self._gave_up.clear()

    def on_refused(self, now: float) -> None:
        self._last_sign = now

    def is_standing(self, now: float, batch_s: float) -> bool:
        if self._last_empty is None:
            self._last_empty = now
        standing = now - self._last_empty > max(STANDING_AFTER_S, batch_s)
        if standing:
            self._standing_until = now
        elif now - self._standing_until > FORGET_AFTER_S:
            self.patience_s = None
        return standing

    def on_answered(self, now: float, items: int) -> None:
        self._answered.append((now, items))

    def on_give_up(self, now: float, age_s: float, batch_s: float, alone_s: float) -> None:
        """A client left after `age_s`, its item waiting or running; alone it would take `alone_s`."""
        if age_s < alone_s:
            return  # who can't wait for its own run can't be served; nor may it teach for the others
        self._gave_up.append((now, age_s))
        self._last_sign = now
        if not self.is_standing(now, batch_s):
            return
        since = now - WINDOW_S
        recent = [(when, age) for when, age in self._gave_up if when >= since]
        answered = sum(items for when, items in self._answered if when >= since)
        is_spread = recent[-1][0] - recent[0][0] >= GIVE_UP_SPAN_S
        if is_spread and len(recent) > GIVE_UP_SHARE * (answered + len(recent)):
            ages = sorted(age for _, age in recent)
            self.patience_s = ages[int(PATIENCE_QUANTILE * len(ages))]

    def allowed_wait_s(self, now: float, batch_s: float) -> float:
        """How long a newcomer may have to wait until its first item begins."""
        if not self.is_standing(now, batch_s):
            return float("inf")
        if self.patience_s is None:
            return max(PATIENT_WAIT_S, 8.0 * batch_s)
        # One full batch must be able to queue behind the running one, or slots would run under-filled.
        return max(HEADROOM * self.patience_s - batch_s, 1.5 * batch_s)

    def prefers_newest(self, now: float, oldest_age_s: float, batch_s: float) -> bool:
        """True while somebody waits who can't be answered before giving up."""
        return (
            self.patience_s is not None
            and self.is_standing(now, batch_s)
            and oldest_age_s + batch_s > self.patience_s
        )
