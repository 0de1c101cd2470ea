"""MiniLM over HTTP against the model alone: how much of the hardware does the server leave to it?

Server, padded offline and our ragged model alone take turns (A B C A B C), and only ratios within a
round are compared: this machine's speed drifts by tens of percent over minutes.
"""

from statistics import median
from typing import Any

from scripts.bench import inputs, offline
from scripts.bench.endpoint import ours
from scripts.bench.processes import CpuMeter
from scripts.bench.report import Report, least, say
from scripts.bench.saturate import client_name, saturate
from scripts.bench.server import Server, application

CONNECTIONS = (32, 64)
MODEL = "deployments.models.minilm:MiniLM"


def run(*, is_short: bool) -> Report:
    rounds, duration_s = (1, 3.0) if is_short else (4, 12.0)
    config = application("embed", MODEL, max_batch_size=32)
    bodies = [ours("embed").body(text) for text in inputs.texts()]
    found: list[dict[str, float]] = []
    details: dict[str, Any] = {}
    with (
        Server(config) as server,
        offline.Reference(offline.padded_minilm) as padded,
        offline.Reference(offline.ragged_minilm) as ragged,
    ):
        saturate(server.port, "/embed/predict", bodies, connections=64, duration_s=3)
        for number in range(rounds):
            figures = {"padded": padded.rate(duration_s / 2), "ragged": ragged.rate(duration_s / 2)}
            for connections in CONNECTIONS:
                before, meter = server.stats("embed")["totals"], CpuMeter(server.tree)
                meter.start()
                got = saturate(
                    server.port, "/embed/predict", bodies, connections=connections, duration_s=duration_s
                )
                cpu_s, by_name, wall_s = meter.stop()
                totals = server.stats("embed")["totals"]
                figures[f"c{connections}"] = got.rate
                details[f"c{connections}"] = {
                    "p50_ms": round(got.p50_ms, 1),
                    "p99_ms": round(got.p99_ms, 1),
                    "failed": got.failed,
                    "refused": totals["refused"] - before["refused"],
                    "mean_batch_items": round(
                        (totals["items"] - before["items"]) / (totals["batches"] - before["batches"]), 2
                    ),
                    "model_busy_share": round((totals["busy_s"] - before["busy_s"]) / wall_s, 3),
                    "cpu_cores_used": round(cpu_s / wall_s, 2),
                    "cpu_s_by_process": by_name,
                }
            figures["padded_after"] = padded.rate(duration_s / 2)
            figures["padded"] = (figures["padded"] + figures["padded_after"]) / 2
            found.append(figures)
            say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))

    def ratio(name: str, to: str) -> float:
        return round(median(figures[name] / figures[to] for figures in found), 4)

    names = [f"c{connections}" for connections in CONNECTIONS]
    every = [*names, "padded", "ragged"]
    return Report(
        "embed",
        {
            "texts_per_s": {name: round(median(f[name] for f in found), 1) for name in every},
            "ratio_to_padded": {name: ratio(name, "padded") for name in names},
            "ratio_to_own_model_alone": {name: ratio(name, "ragged") for name in names},
            "details": details,
            "rounds": [{name: round(value, 1) for name, value in f.items()} for f in found],
        },
        [least(f"ratio_to_padded.{name}", 0.95) for name in names],
        {
            "application": config["args"],
            "texts": len(bodies),
            "words": [8, 128],
            "client": client_name(),
            "round_s": duration_s,
            "ceiling": "transformers BertModel, sorted by length, padded, batches of 32, tokenised before",
        },
        is_short,
    )
