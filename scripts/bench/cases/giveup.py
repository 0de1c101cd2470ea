"""2,000 clients that give up after 50 ms, then ordinary load: is the server still as it was?

The experiment of ray#41057, where batches of the departed made many later requests fail.
"""

from typing import Any

from scripts.bench.arrivals import by_status, count, latency_ms, poisson
from scripts.bench.client import Plan, Sample, run_load
from scripts.bench.endpoint import ours
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server, application

RATE = 40.0
"""Half of what the model can take (100 ms for a batch of 8)."""


def run(*, is_short: bool) -> Report:
    config = application(
        "sleep", "scripts.bench.models:Sleep", model_args={"base_ms": 100.0}, max_batch_size=8
    )
    clients, duration_s, endpoint = 400 if is_short else 2000, 5.0 if is_short else 20.0, ours("sleep")

    def ordinary(server: Server, seed: int) -> list[Sample]:
        shots = [endpoint.shot(1.0, at_s=at_s) for at_s in poisson(RATE, duration_s, seed)]
        return run_load(Plan(server.port, shots)).samples

    with Server(config) as server:
        ordinary(server, seed=1)
        before = ordinary(server, seed=2)
        impatient = [
            endpoint.shot(1.0, at_s=at_s, give_up_s=0.05) for at_s in poisson(400.0, clients / 400.0, seed=3)
        ]
        left = run_load(Plan(server.port, impatient)).samples
        later = ordinary(server, seed=2)
        stats = server.stats("sleep")
    figures: dict[str, Any] = {
        "clients_that_gave_up": count(left, lambda sample: sample.status == 0),
        "their_statuses": by_status(left),
        "later_failed": count(later, lambda sample: sample.status != 200),
        "later_by_status": by_status(later),
        "p50_ms_before": latency_ms(before, 0.5),
        "p50_ms_later": latency_ms(later, 0.5),
        "p99_ms_before": latency_ms(before, 0.99),
        "p99_ms_later": latency_ms(later, 0.99),
        "left_in_queue": stats["queue"]["items"],
    }
    figures["p50_ratio"] = round(figures["p50_ms_later"] / figures["p50_ms_before"], 4)
    say(f"  {figures}")
    return Report(
        "giveup",
        figures,
        [most("later_failed", 0), most("p50_ratio", 1.1)],
        {"application": config["args"], "ordinary_per_s": RATE, "give_up_after_s": 0.05, "at_per_s": 400},
        is_short,
    )
