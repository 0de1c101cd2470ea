"""Which neighbouring slots attend in one call: few calls against little padding.

Owns: that choice, plain arithmetic. Must not know: tensors. A call reads all its slots up to the
longest of them, slots without a row of their own (idle, or in a chunk) included.
"""

import math
from collections.abc import Sequence as Values
from dataclasses import dataclass

MOST = 3
"""Spans of a step. 16 lengths of 16 to 444 tokens: 6,856 token rows read in one span, 5,988 in three."""

_CALL_COST = 300
"""Of one more call, in tokens read: 60 us a layer against 0.17 us a token, on one core."""


@dataclass(frozen=True, slots=True)
class Span:
    """Slots [first, end), of which members [begin, stop) of the sorted ones have a row."""

    first: int
    end: int
    begin: int
    stop: int

    @property
    def size(self) -> int:
        return self.end - self.first


def cut(slots: Values[int], lengths: Values[int]) -> list[Span]:
    """The cheapest cover of `slots` (ascending), whose sequences have `lengths`, by at most MOST spans."""
    empty: tuple[float, list[Span]] = (0.0, [])
    best = [empty] + [(math.inf, list[Span]())] * len(slots)  # of the first n members
    for _ in range(MOST):
        best = [empty, *(_extend(best, slots, lengths, stop) for stop in range(1, len(slots) + 1))]
    return best[-1][1]


def _extend(
    best: list[tuple[float, list[Span]]], slots: Values[int], lengths: Values[int], stop: int
) -> tuple[float, list[Span]]:
    """The cheapest cover of the first `stop` members whose last span was added now."""
    options: list[tuple[float, list[Span]]] = []
    longest = 0
    for begin in range(stop - 1, -1, -1):
        longest = max(longest, lengths[begin])
        span = Span(slots[begin], slots[stop - 1] + 1, begin, stop)
        cost, before = best[begin]
        options.append((cost + span.size * longest + _CALL_COST, [*before, span]))
    return min(options, key=lambda option: option[0])
