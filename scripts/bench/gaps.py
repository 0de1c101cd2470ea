"""How evenly a stream speaks: the times between its events. Pure; times are seconds, ascending."""

import itertools
from collections.abc import Iterable, Sequence
from statistics import median


def gaps_ending_in(times_s: Sequence[float], since_s: float, until_s: float) -> list[float]:
    """Gaps of one stream that end in [since_s, until_s]."""
    return [later - earlier for earlier, later in itertools.pairwise(times_s) if since_s <= later <= until_s]


def median_gap_s(streams: Iterable[Sequence[float]], since_s: float, until_s: float) -> float:
    """The median of all streams' gaps in the window. ValueError where there is none."""
    return median(gap for times_s in streams for gap in gaps_ending_in(times_s, since_s, until_s))


def longest_gap_s(streams: Iterable[Sequence[float]], since_s: float, until_s: float) -> float:
    """The longest gap that overlaps the window, whole; what a stream keeps silent at its end counts too.

    A gap that began before the window is in it: the stall that an arrival causes begins there.
    """
    longest = 0.0
    for times_s in streams:
        ends_s = [time_s for time_s in times_s if time_s <= until_s]
        after_s = [time_s for time_s in times_s if time_s > until_s][:1]
        marks_s = [*ends_s, *(after_s or [until_s])]
        longest = max([longest, *gaps_ending_in(marks_s, since_s, marks_s[-1])])
    return longest
