"""EfficientNet-Lite0 over HTTP, JPEG bodies, against decode + model as a pipeline in one process."""

from typing import Any

from scripts.bench import inputs, offline
from scripts.bench.report import Report, least
from scripts.bench.saturate import steady
from scripts.bench.server import Server, shipped
from scripts.bench.turns import Turns

CONNECTIONS = (32, 64)


def run(*, is_short: bool) -> Report:
    rounds, slice_s = (1, 3.0) if is_short else (8, 4.0)
    config = shipped("classify")
    images = inputs.jpegs()
    details: dict[str, Any] = {}
    with (
        Server(config) as server,
        offline.Reference(offline.classify_pipeline) as pipeline,
        offline.Reference(offline.classify_model_alone) as alone,
    ):

        def serve(connections: int) -> float:
            before = server.stats("classify")["totals"]
            got = steady(
                server.port,
                "/classify/predict",
                images,
                connections=connections,
                duration_s=slice_s,
                content_type="image/jpeg",
            )
            totals = server.stats("classify")["totals"]
            batches = totals["batches"] - before["batches"]
            details[f"c{connections}"] = {
                "p50_ms": round(got.p50_ms, 1),
                "failed": got.failed,
                "mean_batch_items": round((totals["items"] - before["items"]) / batches, 2),
                "model_s_per_item": round(
                    (totals["busy_s"] - before["busy_s"]) / (totals["items"] - before["items"]), 5
                ),
            }
            return got.rate

        serve(32)
        turns = Turns(
            ceiling=lambda: pipeline.rate(slice_s / 2),
            servers={f"c{n}": lambda n=n: serve(n) for n in CONNECTIONS},  # type: ignore[misc]
            others={"model_alone": lambda: alone.rate(slice_s / 2)},
        )
        turns.run(rounds)
    return Report(
        "classify",
        turns.figures("images_per_s") | {"last_slices": details},
        [least(f"ratio.c{n}", 0.85) for n in CONNECTIONS],
        {
            "application": config["args"],
            "images": len(images),
            "mean_bytes": round(sum(map(len, images)) / len(images)),
            "slice_s": slice_s,
            "ceiling": "one process: a decode thread ahead of a model thread, batches of 16, same weights",
        },
        is_short,
    )
