"""How much faster one setting is than another, and how sure that is.

Owns: the interval. Looks at both were taken in turns, so that each pair saw the same machine: what counts
is the ratio within a pair. Must not know: what was measured. Source: Student, "The Probable Error of a Mean",
Biometrika 1908; logarithms, since ratios multiply.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
    2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratio:
    """`times` as fast; 95 % of such intervals hold the truth. pairs: looks at each."""

    times: float
    low: float
    high: float
    pairs: int

    @property
    def is_better(self) -> bool:
        return self.low > 1.0

    @property
    def is_worse(self) -> bool:
        return self.high < 1.0

    def is_flat(self, within: float) -> bool:
        """No more apart than `within` (0.03: 3 %), surely."""
        return self.low > 1.0 - within and self.high < 1.0 + within

    def text(self) -> str:
        if self.pairs < 2:
            return f"{self.times:.2f} times (one look)"
        return f"{self.times:.2f} times (95 % between {self.low:.2f} and {self.high:.2f})"


def ratio(these: Sequence[float], those: Sequence[float]) -> Ratio:
    """These over those, look by look; the longer list's first looks are left out. ValueError without any."""
    pairs = min(len(these), len(those))
    if not pairs:
        raise ValueError("no looks to compare")
    pairs_of = zip(these[-pairs:], those[-pairs:], strict=True)
    logs = [math.log(max(a, 1e-9) / max(b, 1e-9)) for a, b in pairs_of]
    mean = statistics.fmean(logs)
    if pairs == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, 1)
    half = _T[min(pairs - 2, len(_T) - 1)] * statistics.stdev(logs) / math.sqrt(pairs)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), pairs)
