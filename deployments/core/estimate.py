"""How long will a batch take? A straight line through what was measured, old runs forgotten.

Owns: seconds as a function of a batch's cost. Must not know: queues, slots.
Source: least squares with exponential forgetting (recursive sums, no history kept).
"""

import math

FORGET = 0.9
"""Weight of the past at each new batch: about the last 10 count, so that a model that becomes slower
(a second slot that runs beside it, a neighbour on the machine) is believed after a few batches."""


class BatchTimeModel:
    """seconds ~ base + slope * cost, both never negative."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def is_measured(self) -> bool:
        return self._n > 0.0

    def observe(self, cost: float, seconds: float) -> None:
        """Learn from one finished batch of total `cost`."""
        for name, value in (
            ("_n", 1.0),
            ("_x", cost),
            ("_y", seconds),
            ("_xx", cost * cost),
            ("_xy", cost * seconds),
        ):
            setattr(self, name, getattr(self, name) * FORGET + value)

    def predict_s(self, cost: float) -> float:
        """Expected seconds of a batch of total `cost`; 0 before anything was measured."""
        base_s, slope = self._line()
        return base_s + slope * cost

    def cost_within(self, seconds: float) -> float:
        """The cost of a batch that takes `seconds`; infinite where smaller batches would not help,
        because most of the time is not for the items."""
        base_s, slope = self._line()
        if slope <= 0.0 or base_s > seconds / 2.0:
            return math.inf
        return (seconds - base_s) / slope

    def _line(self) -> tuple[float, float]:
        """(seconds at cost 0, seconds a unit of cost), neither negative."""
        if not self.is_measured:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        # Batches of one size only (spread ~ 0) tell nothing of a slope: then the mean is the answer.
        if spread <= 1e-9 * max(1.0, mean_x * mean_x):
            return mean_y, 0.0
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread)
        slope = min(slope, mean_y / mean_x)  # a negative base would predict negative time
        return mean_y - slope * mean_x, slope
