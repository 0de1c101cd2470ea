"""What a batch may cost before memory runs out: learned from what failed and what fitted.

Owns: that bound, as a function of what happened and `now`. Must not know: bytes, devices, who asks. The
search is a bisection between the dearest batch that fitted and the cheapest that failed, since a bound that
is merely halved leaves half of the throughput behind; what failed is forgotten slowly, since memory that
others took may come back. A failed probe costs one split, never an answer.
"""

import math

CLOSE = 0.04
"""Fitted and failed this close (as a share) are close enough: no more probes."""
PROOFS = 3
"""Batches near the bound that must have fitted before it is raised."""
NEAR = 0.85
"""Of the bound: a batch that costs as much says something about it."""
HOLD_S = 30.0
"""Nothing failed for so long: what failed once is doubted. Doubles whenever the doubt was wrong."""
MAX_HOLD_S = 600.0
FORGET = 1.25
"""By how much a doubted failure is moved up at a time."""


class CostLimit:
    """`value` is the bound in force, infinite until memory has run out or `cap` was set.

    cap: a prediction from measured bytes; the bound never exceeds it. failures: batches that ran out.
    """

    def __init__(self) -> None:
        self.cap = math.inf
        self.failures = 0
        self._fitted = 0.0
        self._failed = math.inf
        self._bound = math.inf
        self._proofs = 0
        self._is_proven = self._is_doubted = False
        self._since = 0.0
        self._hold_s = HOLD_S

    @property
    def value(self) -> float:
        return min(self._bound, self.cap)

    def on_out_of_memory(self, now: float, failed: float, fitted: float = 0.0) -> None:
        """A batch of cost `failed` ran out of memory; its dearest part that went through cost `fitted`."""
        self.failures += 1
        if failed > self._failed and not self._is_doubted:
            return  # dearer than what is known to fail: it was under way before
        if self._is_doubted:
            self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s)
        # What fitted before the last failure says nothing of now: memory has shrunk since.
        known = [cost for cost in (fitted, self._fitted if self._is_proven else 0.0) if 0.0 < cost < failed]
        self._failed, self._fitted = failed, max(known, default=failed / 2)
        self._is_proven = self._is_doubted = False
        self._since, self._proofs = now, 0
        self._bound = self._fitted if self._is_close else (self._fitted + failed) / 2

    def on_fitted(self, now: float, cost: float) -> None:
        """A batch of this cost went through."""
        if self._failed == math.inf or cost < NEAR * self._bound:
            return
        self._proofs += 1
        if self._proofs < PROOFS:
            return
        self._proofs, self._is_proven = 0, True
        self._fitted = max(self._fitted, cost)
        if not self._is_close:
            self._bound = (self._fitted + self._failed) / 2
        elif now - self._since >= self._hold_s:
            self._since, self._is_doubted = now, True
            self._failed *= FORGET
            self._bound = (self._fitted + self._failed) / 2

    @property
    def _is_close(self) -> bool:
        return self._failed - self._fitted <= CLOSE * self._failed
