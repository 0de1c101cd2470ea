"""Twice the capacity, clients that give up after 1 s: how many are answered before they go?

With a sleeping model (100 ms for a batch of 8: 80 a second), and with MiniLM, whose refusals take CPU
from the very model that is overloaded; its capacity is measured just before.
"""

import time
from collections.abc import Sequence
from typing import Any

from scripts.bench import inputs
from scripts.bench.endpoint import Endpoint, ours
from scripts.bench.loads import PATIENCE_S, Offer, impatient
from scripts.bench.report import Report, least, most, say
from scripts.bench.saturate import steady
from scripts.bench.server import Server, application, shipped

BATCH, BATCH_MS = 8, 100.0
FORGET_S = 4.0
"""Between two loads, so that a server that learns from the one begins the next without it."""
CAPACITY = BATCH / (BATCH_MS / 1e3)


def run(*, is_short: bool) -> Report:
    sleep = application(
        "sleep", "scripts.bench.models:Sleep", model_args={"base_ms": BATCH_MS}, max_batch_size=BATCH
    )
    embed = shipped("embed")
    with Server(sleep) as server:
        figures: dict[str, Any] = {"sleep": sleeping(server.port, ours("sleep"), is_short=is_short)}
    with Server(embed) as server:
        figures["minilm"] = embedding(server.port, ours("embed"), is_short=is_short)
    return Report(
        "overload",
        figures,
        [
            least("sleep.twice_said.answered_of_capacity", 0.95),
            least("sleep.twice_unsaid.answered_of_capacity", 0.85),
            least("sleep.three_quarters_said.answered_of_offered", 1.0),
            least("sleep.three_quarters_unsaid.answered_of_offered", 1.0),
            most("sleep.twice_said.refusals_ms.p50", 10.0),
            most("sleep.twice_said.refusals_ms.p99", 50.0),
            most("sleep.twice_unsaid.refusals_ms.p50", 10.0),
            most("sleep.twice_unsaid.refusals_ms.p99", 50.0),
            least("minilm.twice_said.answered_of_capacity", 0.9),
            least("minilm.twice_unsaid.answered_of_capacity", 0.9),
        ],
        {
            "applications": [sleep["args"], embed["args"]],
            "patience_s": PATIENCE_S,
            "sleep_capacity_per_s": CAPACITY,
        },
        is_short,
    )


def sleeping(port: int, endpoint: Endpoint, *, is_short: bool) -> dict[str, Any]:
    """The sleeping model, at 2 and at 0.75 of its capacity, patience said and unsaid."""
    duration_s, warm_up_s = (8.0, 4.0) if is_short else (35.0, 5.0)
    figures = {}
    for name, share in (("three_quarters", 0.75), ("twice", 2.0)):
        for says_so in (True, False):
            time.sleep(FORGET_S)
            offer = Offer([1.0], share * CAPACITY, duration_s, warm_up_s)
            found = impatient(port, endpoint, offer, says_so=says_so, capacity=CAPACITY)
            figures[f"{name}_{'said' if says_so else 'unsaid'}"] = found
            say(f"  sleep {name}, said {says_so}: {found}")
    return figures


def embedding(
    port: int, endpoint: Endpoint, *, is_short: bool, said: Sequence[bool] = (True, False)
) -> dict[str, Any]:
    """MiniLM at twice the rate it reaches with 64 connections, measured before and after."""
    duration_s, warm_up_s = (8.0, 4.0) if is_short else (30.0, 5.0)
    texts = inputs.texts()
    bodies = [endpoint.body(text) for text in texts]

    def capacity() -> float:
        seconds = 3.0 if is_short else 10.0
        return steady(port, endpoint.path, bodies, connections=64, duration_s=seconds).rate

    capacity()
    figures: dict[str, Any] = {}
    for says_so in said:
        before = capacity()
        time.sleep(FORGET_S)
        offer = Offer(texts, 2.0 * before, duration_s, warm_up_s)
        found = impatient(port, endpoint, offer, says_so=says_so, capacity=before)
        found["capacity_per_s"] = round(before, 1)
        found["capacity_after_per_s"] = round(capacity(), 1)
        figures[f"twice_{'said' if says_so else 'unsaid'}"] = found
        say(f"  minilm twice, said {says_so}: {found}")
    return figures
