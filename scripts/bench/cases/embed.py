"""MiniLM over HTTP against the model alone: how much of the hardware does the server leave to it?

The ceiling is what an offline job would do: transformers, texts sorted by length, padded batches of
32, tokenised beforehand. Our own ragged model alone is beside it: what the server could reach.
"""

from typing import Any

from scripts.bench import inputs, offline
from scripts.bench.endpoint import Endpoint, ours
from scripts.bench.processes import CpuMeter
from scripts.bench.report import Report, least
from scripts.bench.saturate import steady
from scripts.bench.server import Server, shipped
from scripts.bench.turns import Turns

CONNECTIONS = (32, 64)


def run(*, is_short: bool) -> Report:
    rounds, slice_s = (1, 3.0) if is_short else (8, 5.0)
    config = shipped("embed")
    endpoint = ours("embed")
    bodies = [endpoint.body(text) for text in inputs.texts()]
    details: dict[str, Any] = {}
    with (
        Server(config) as server,
        offline.Reference(offline.padded_minilm) as padded,
        offline.Reference(offline.ragged_minilm) as ragged,
    ):

        def serve(connections: int) -> float:
            before, meter = server.stats("embed")["totals"], CpuMeter(server.tree)
            meter.start()
            got = steady(server.port, endpoint.path, bodies, connections=connections, duration_s=slice_s)
            cpu_s, by_name, _ = meter.stop()
            totals = server.stats("embed")["totals"]
            done = {name: totals[name] - before[name] for name in ("items", "batches", "busy_s", "refused")}
            details[f"c{connections}"] = {
                "p50_ms": round(got.p50_ms, 1),
                "p99_ms": round(got.p99_ms, 1),
                "failed": got.failed,
                "refused": done["refused"],
                "mean_batch_items": round(done["items"] / done["batches"], 2),
                "model_s_per_item": round(done["busy_s"] / done["items"], 5),
                "cpu_s_per_item": round(cpu_s / done["items"], 5),
                "cpu_s_by_process": by_name,
            }
            return got.rate

        serve(64)
        turns = Turns(
            ceiling=lambda: padded.rate(slice_s / 2),
            servers={f"c{n}": lambda n=n: serve(n) for n in CONNECTIONS},  # type: ignore[misc]
            others={"own_model_alone": lambda: ragged.rate(slice_s / 2)},
        )
        turns.run(rounds)
    return Report(
        "embed",
        turns.figures("texts_per_s") | {"last_slices": details},
        [least(f"ratio.c{n}", 0.95) for n in CONNECTIONS],
        {
            "application": config["args"],
            "texts": len(bodies),
            "words": [8, 128],
            "slice_s": slice_s,
            "ceiling": "transformers BertModel, sorted by length, padded, batches of 32, tokenised before",
        },
        is_short,
    )


def against_offline(port: int, endpoint: Endpoint, *, is_short: bool) -> dict[str, Any]:
    """The same turns for a server that isn't ours."""
    rounds, slice_s = (1, 3.0) if is_short else (4, 5.0)
    bodies = [endpoint.body(text) for text in inputs.texts()]

    def serve(connections: int) -> float:
        return steady(port, endpoint.path, bodies, connections=connections, duration_s=slice_s).rate

    with offline.Reference(offline.padded_minilm) as padded:
        serve(64)
        turns = Turns(
            ceiling=lambda: padded.rate(slice_s / 2),
            servers={f"c{n}": lambda n=n: serve(n) for n in CONNECTIONS},  # type: ignore[misc]
        )
        turns.run(rounds)
    return turns.figures("texts_per_s")
