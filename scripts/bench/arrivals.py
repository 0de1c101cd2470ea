"""When requests come, and what a list of samples amounts to. Pure; seeds are the caller's."""

import random
from collections.abc import Callable, Iterable, Sequence

from deployments.core.figures import quantile
from scripts.bench.client import BROKEN, GAVE_UP, Sample


def poisson(rate: float, duration_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process, ascending, in [0, duration_s)."""
    source = random.Random(seed)
    times, now = [], source.expovariate(rate)
    while now < duration_s:
        times.append(now)
        now += source.expovariate(rate)
    return times


def after(samples: Iterable[Sample], warm_up_s: float) -> list[Sample]:
    """Only what was meant to be sent after the warm-up."""
    return [sample for sample in samples if sample.at_s >= warm_up_s]


def latency_ms(samples: Iterable[Sample], q: float, *, status: int = 200) -> float:
    """The q-quantile of latency, of answers with this status; 0 where there are none."""
    ordered = sorted(sample.latency_s for sample in samples if sample.status == status)
    return round(1e3 * quantile(ordered, q), 3)


def lag_ms(samples: Iterable[Sample], q: float = 0.99) -> float:
    """How late the client itself was: above a few ms the client, not the server, was measured."""
    return round(1e3 * quantile(sorted(sample.lag_s for sample in samples), q), 3)


def count(samples: Sequence[Sample], test: Callable[[Sample], bool]) -> int:
    return sum(1 for sample in samples if test(sample))


def by_status(samples: Iterable[Sample]) -> dict[str, int]:
    """Counts by status; clients that gave up and broken connections under their names."""
    names = {GAVE_UP: "gave_up", BROKEN: "broken"}
    counts: dict[str, int] = {}
    for sample in samples:
        name = names.get(sample.status, str(sample.status))
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
