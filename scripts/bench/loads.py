"""The loads that ours and the peers' servers get alike: overload, poison.

Owns: what is offered and what counts as answered. Must not know: whose server it is.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.arrivals import after, by_status, count, lag_ms, latency_ms, poisson
from scripts.bench.client import Plan, Sample, run_load
from scripts.bench.endpoint import Endpoint
from scripts.bench.models import POISON

PATIENCE_S = 1.0
"""Clients close their connection after this long."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Poisson arrivals at `rate` of items taken in turn; the first warm_up_s don't count."""

    items: Sequence[Any]
    rate: float
    duration_s: float
    warm_up_s: float = 5.0
    seed: int = 11


def impatient(
    port: int, endpoint: Endpoint, offer: Offer, *, says_so: bool, capacity: float
) -> dict[str, Any]:
    """Offer load to clients' patience; says_so: each request carries the patience as timeout_ms."""
    items = itertools.cycle(offer.items)
    shots = [
        endpoint.shot(
            next(items),
            at_s=at_s,
            give_up_s=PATIENCE_S,
            timeout_ms=1e3 * PATIENCE_S if says_so else None,
        )
        for at_s in poisson(offer.rate, offer.duration_s, offer.seed)
    ]
    load = run_load(Plan(port, shots))
    kept = after(load.samples, offer.warm_up_s)
    answered = count(kept, lambda sample: sample.status == 200)
    window_s = offer.duration_s - offer.warm_up_s
    return {
        "offered_per_s": round(len(kept) / window_s, 2),
        "answered_per_s": round(answered / window_s, 2),
        "answered_of_capacity": round(answered / window_s / capacity, 4),
        "answered_of_offered": round(answered / len(kept), 4),
        "answers_ms": {"p50": latency_ms(kept, 0.5), "p99": latency_ms(kept, 0.99)},
        "refusals_ms": {
            "p50": latency_ms(kept, 0.5, status=503),
            "p99": latency_ms(kept, 0.99, status=503),
        },
        "by_status": by_status(kept),
        "client": {"lag_ms_p99": lag_ms(kept), "busy_share": round(load.busy_share, 3)},
    }


def poisoned(
    port: int, endpoint: Endpoint, *, requests: int, share: float = 0.02, seed: int = 5
) -> dict[str, Any]:
    """Closed loop of 32 with a share of poison; an innocent fails when its answer isn't 2x + 1."""
    source = random.Random(5)
    items = [POISON if source.random() < share else float(i) for i in range(requests)]
    shots = [endpoint.shot(item, tag=repr(item)) for item in items]
    load = run_load(Plan(port, shots, connections=32, keeps_bodies=True))
    innocents = [sample for sample in load.samples if float(sample.tag) != POISON]
    failed = count(innocents, lambda sample: not _is_right(endpoint, sample))
    return {
        "innocents": len(innocents),
        "poisoned": requests - len(innocents),
        "innocents_failed": failed,
        "innocents_failed_share": round(failed / len(innocents), 4),
        "by_status": by_status(load.samples),
    }


def _is_right(endpoint: Endpoint, sample: Sample) -> bool:
    return sample.status == 200 and endpoint.value(sample) == 2.0 * float(sample.tag) + 1.0
