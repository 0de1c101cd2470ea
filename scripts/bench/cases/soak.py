"""Everything that goes wrong at once, 10,000 times: what is left must be right, and nothing be left.

1 % of the requests are poison, 1 % leave after 15 ms, 1 % allow 1 ms. Every other answer is checked.
"""

import random
import time
from typing import Any

from scripts.bench.arrivals import by_status, count
from scripts.bench.client import GAVE_UP, Plan, Sample, Shot, run_load
from scripts.bench.endpoint import Endpoint, ours
from scripts.bench.models import POISON
from scripts.bench.report import Report, least, most, say
from scripts.bench.server import Server, application

PARTS = 5
LEAVE_AFTER_S = 0.015
TOO_SHORT_MS = 1.0


def run(*, is_short: bool) -> Report:
    config = application(
        "soak",
        "scripts.bench.models:PoisonSleep",
        model_args={"base_ms": 10.0, "item_ms": 0.5},
        max_batch_size=16,
    )
    requests, endpoint = 1000 if is_short else 10_000, ours("soak")
    source = random.Random(9)
    samples: list[Sample] = []
    with Server(config) as server:
        # The first part warms up caches and allocators; memory is compared from then on.
        rss_mib = []
        for part in range(PARTS):
            shots = [_shot(endpoint, source, part * requests + i) for i in range(requests // PARTS)]
            samples += run_load(Plan(server.port, shots, connections=48, keeps_bodies=True)).samples
            rss_mib.append(round(server.tree.rss_bytes("ray::") / 2**20, 1))
            say(f"  part {part + 1}/{PARTS}: {by_status(samples)}, replicas {rss_mib[-1]} MiB")
        time.sleep(1.0)
        stats = server.stats("soak")
        rss_all_mib = round(server.tree.rss_bytes() / 2**20, 1)
    figures = {
        **_judged(samples, endpoint),
        "left_in_queue": stats["queue"]["items"],
        "left_in_flight": stats["in_flight"],
        "slots_busy": stats["slots"]["busy"],
        "rss_mib_after_each_part": rss_mib,
        "rss_growth": round(rss_mib[-1] / rss_mib[0] - 1.0, 4),
        "rss_mib_all_processes": rss_all_mib,
        "totals": stats["totals"],
    }
    targets = [
        least("innocents_right_share", 1.0),
        most("left_in_queue", 0),
        most("left_in_flight", 0),
        most("rss_growth", 0.02),
    ]
    return Report("soak", figures, targets, {"application": config["args"], "connections": 48}, is_short)


def _shot(endpoint: Endpoint, source: random.Random, number: int) -> Shot:
    draw = source.random()
    if draw < 0.01:
        return endpoint.shot(POISON, tag=f"poison {number}")
    if draw < 0.02:
        return endpoint.shot(float(number), give_up_s=LEAVE_AFTER_S, tag=f"leaver {number}")
    if draw < 0.03:
        return endpoint.shot(float(number), timeout_ms=TOO_SHORT_MS, tag=f"late {number}")
    return endpoint.shot(float(number), tag=f"innocent {number}")


def _judged(samples: list[Sample], endpoint: Endpoint) -> dict[str, Any]:
    kinds: dict[str, list[Sample]] = {"innocent": [], "poison": [], "leaver": [], "late": []}
    for sample in samples:
        kinds[sample.tag.split()[0]].append(sample)

    def is_right(sample: Sample) -> bool:
        wanted = 2.0 * float(sample.tag.split()[1]) + 1.0
        return sample.status == 200 and endpoint.value(sample) == wanted

    right = count(kinds["innocent"], is_right)
    return {
        "innocents": len(kinds["innocent"]),
        "innocents_right": right,
        "innocents_right_share": round(right / max(1, len(kinds["innocent"])), 6),
        "innocents_by_status": by_status(kinds["innocent"]),
        "poison_by_status": by_status(kinds["poison"]),
        "leavers_gone": count(kinds["leaver"], lambda sample: sample.status == GAVE_UP),
        "late_by_status": by_status(kinds["late"]),
    }
