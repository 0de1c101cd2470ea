"""Under a backlog every batch should be full: items run over batches run, over max_batch_size."""

import threading
import time
from typing import Any

from scripts.bench.client import Plan, run_load
from scripts.bench.endpoint import ours
from scripts.bench.report import Report, least, say
from scripts.bench.server import Server, application

BATCH = 32
SLEEP = {"base_ms": 40.0, "item_ms": 2.0}


def run(*, is_short: bool) -> Report:
    config = application("sleep", "scripts.bench.models:Sleep", model_args=SLEEP, max_batch_size=BATCH)
    figures: dict[str, Any] = {}
    duration_s = 3.0 if is_short else 20.0
    with Server(config) as server:
        for connections in (2 * BATCH, 4 * BATCH):
            figures[f"c{connections}"] = _fill(server, connections, duration_s)
            say(f"  {connections} connections: {figures[f'c{connections}']}")
    return Report(
        "fill",
        figures,
        [least(f"c{connections}.mean_fill", 0.95) for connections in (2 * BATCH, 4 * BATCH)],
        {"application": config["args"], "window_s": duration_s},
        is_short,
    )


def _fill(server: Server, connections: int, duration_s: float) -> dict[str, Any]:
    """Both readings fall into the load: its first and last batches can't be full."""
    plan = Plan(server.port, [ours("sleep").shot(1.0)], connections, duration_s + 4.0)
    load = threading.Thread(target=run_load, args=(plan,))
    load.start()
    time.sleep(2.0)  # the client's start included
    before = server.stats("sleep")["totals"]
    time.sleep(duration_s)
    totals = server.stats("sleep")["totals"]
    load.join()
    batches = totals["batches"] - before["batches"]
    mean = (totals["items"] - before["items"]) / batches
    return {"batches": batches, "mean_items": round(mean, 3), "mean_fill": round(mean / BATCH, 4)}
