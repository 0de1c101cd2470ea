"""The denoiser of 4 to 50 steps, Poisson 20/s: mean latency against request-level batches.

Request-level: a batch takes as long as its longest request, and newcomers wait for its end.
"""

import random
from typing import Any

from scripts.bench.arrivals import poisson
from scripts.bench.client import Shot
from scripts.bench.endpoint import ours
from scripts.bench.report import Report, most
from scripts.bench.server import Server, continuous
from scripts.bench.whole_batches import compare

RATE, SLOTS = 20.0, 16
STEPS = (4, 50)


def run(*, is_short: bool) -> Report:
    rounds, duration_s, warm_up_s = (1, 6.0, 1.0) if is_short else (6, 40.0, 5.0)
    config = continuous("denoiser", "deployments.models.denoiser:Denoiser", max_sequences=SLOTS)
    endpoint = ours("denoiser")

    def shots_of(number: int) -> list[Shot]:
        source = random.Random(number)
        times_s = poisson(RATE, duration_s, seed=60 + number)
        return [endpoint.shot(_item(source), at_s=at_s) for at_s in times_s]

    with Server(config) as server:
        found = compare(server.port, shots_of, rounds=rounds, batch_size=SLOTS, warm_up_s=warm_up_s)
    return Report(
        "denoiser",
        found,
        [most("ratio", 0.5), most("failed", 0)],
        {"application": config["args"], "rate_per_s": RATE, "steps": list(STEPS), "duration_s": duration_s},
        is_short,
    )


def _item(source: random.Random) -> dict[str, Any]:
    return {"steps": source.randint(*STEPS), "seed": source.getrandbits(31)}
