"""Requests that join and leave at every step, against waiting for whole batches on the same server.

Owns: the comparison. The baseline is made by the client: it sends what has come by the time that all of
the batch before have ended, so the kernels, the HTTP and the model are the same. Latency counts from
arrival in both.
"""

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from scripts.bench.arrivals import after, by_status
from scripts.bench.client import Plan, Shot, run_load
from scripts.bench.report import say


def compare(
    port: int, shots_of: Callable[[int], Sequence[Shot]], *, rounds: int, batch_size: int, warm_up_s: float
) -> dict[str, Any]:
    """shots_of: a round's number -> its arrivals, the same for both ways, which take turns."""
    found: dict[str, list[dict[str, Any]]] = {"continuous": [], "whole_batches": []}
    for number in range(rounds):
        shots = shots_of(number)
        ways = list(zip(found, (0, batch_size), strict=True))
        # Whoever goes second finds the machine as the first left it: they change places.
        for name, size in ways if number % 2 == 0 else reversed(ways):
            load = run_load(Plan(port, shots, batch_size=size))
            kept = after(load.samples, warm_up_s)
            good = sorted(sample.latency_s for sample in kept if sample.status == 200)
            if not good:
                raise RuntimeError(f"no request was answered: {by_status(load.samples)}")
            found[name].append(
                {
                    "mean_s": round(fmean(good), 4),
                    "p50_s": round(median(good), 4),
                    "max_s": round(good[-1], 4),
                    "by_status": by_status(kept),
                    "client_busy_share": round(load.busy_share, 3),
                }
            )
            say(f"  round {number + 1}/{rounds} {name}: {found[name][-1]}")
    pairs = zip(found["continuous"], found["whole_batches"], strict=True)
    return {
        "ratio": round(median(ours["mean_s"] / batches["mean_s"] for ours, batches in pairs), 4),
        "failed": sum(
            count
            for runs in found.values()
            for run in runs
            for status, count in run["by_status"].items()
            if status != "200"
        ),
        **found,
    }
