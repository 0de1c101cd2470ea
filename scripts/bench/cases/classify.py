"""EfficientNet-Lite0 over HTTP, JPEG bodies, against decode + model as a pipeline in one process."""

from statistics import median
from typing import Any

from scripts.bench import inputs, offline
from scripts.bench.report import Report, least, say
from scripts.bench.saturate import client_name, saturate
from scripts.bench.server import Server, application

CONNECTIONS = (32, 64)
MODEL = "deployments.models.efficientnet:EfficientNetLite0"


def run(*, is_short: bool) -> Report:
    rounds, duration_s = (1, 3.0) if is_short else (4, 10.0)
    config = application("classify", MODEL, max_batch_size=16)
    images = inputs.jpegs()
    found: list[dict[str, float]] = []
    details: dict[str, Any] = {}
    with (
        Server(config) as server,
        offline.Reference(offline.classify_pipeline) as pipeline,
        offline.Reference(offline.classify_model_alone) as alone,
    ):

        def serve(connections: int, seconds: float) -> float:
            got = saturate(
                server.port,
                "/classify/predict",
                images,
                connections=connections,
                duration_s=seconds,
                content_type="image/jpeg",
            )
            details[f"c{connections}"] = {"p50_ms": round(got.p50_ms, 1), "failed": got.failed}
            return got.rate

        serve(32, 3.0)
        for number in range(rounds):
            figures = {"pipeline": pipeline.rate(duration_s / 2), "model_alone": alone.rate(duration_s / 2)}
            figures |= {f"c{connections}": serve(connections, duration_s) for connections in CONNECTIONS}
            figures["pipeline"] = (figures["pipeline"] + pipeline.rate(duration_s / 2)) / 2
            found.append(figures)
            say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
        recent = server.stats("classify")["recent"]

    names = [f"c{connections}" for connections in CONNECTIONS]
    every = [*names, "pipeline", "model_alone"]
    return Report(
        "classify",
        {
            "images_per_s": {name: round(median(f[name] for f in found), 1) for name in every},
            "ratio_to_pipeline": {
                name: round(median(f[name] / f["pipeline"] for f in found), 4) for name in names
            },
            "mean_batch_items": round(recent["batch_items_mean"], 2),
            "details": details,
            "rounds": [{name: round(value, 1) for name, value in f.items()} for f in found],
        },
        [least(f"ratio_to_pipeline.{name}", 0.85) for name in names],
        {
            "application": config["args"],
            "images": len(images),
            "mean_bytes": round(sum(map(len, images)) / len(images)),
            "client": client_name(),
            "round_s": duration_s,
            "ceiling": "one process: a decode thread ahead of a model thread, batches of 16, same weights",
        },
        is_short,
    )
