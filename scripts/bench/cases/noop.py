"""What the way costs: a model that does nothing through HAProxy, HTTP, batcher and @serve.batch.

CPU of all server processes together (HAProxy, replica, controller, raylet, GCS, dashboard), divided
by requests. The floor is an ASGI echo on the same HAProxy, in the same server, in turns.
"""

import time
from statistics import median
from typing import Any

from scripts.bench.endpoint import ours
from scripts.bench.processes import CpuMeter
from scripts.bench.report import Report, most, say
from scripts.bench.saturate import client_name, saturate
from scripts.bench.server import Server, application, plain_application
from scripts.bench.turns import Strangers

PATHS = {"noop": "/noop/predict", "tensor_noop": "/tensor/predict", "echo": "/echo/"}


def run(*, is_short: bool) -> Report:
    rounds, duration_s = (1, 2.0) if is_short else (7, 5.0)
    applications = [
        application("noop", "scripts.bench.models:Noop"),
        application("tensor", "scripts.bench.models:TensorNoop"),
        plain_application("echo", "scripts.bench.echo:app"),
    ]
    body = ours("noop").body(1.0)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PATHS}
    with Server(*applications) as server:
        meter = CpuMeter(server.tree)
        for path in PATHS.values():
            saturate(server.port, path, [body], connections=32, duration_s=2)
        time.sleep(2)
        meter.start()
        time.sleep(2 if is_short else 10)
        idle_s, _, wall_s = meter.stop()
        idle_cores = idle_s / wall_s
        watch = Strangers()
        for number in range(rounds):
            for name, path in PATHS.items():
                before = _served(server, name)
                meter.start()
                got = saturate(server.port, path, [body], connections=32, duration_s=duration_s)
                cpu_s, by_name, wall_s = meter.stop()
                requests = got.rate * duration_s if before is None else (_served(server, name) or 0) - before
                found[name].append(
                    {
                        "requests_per_s": round(got.rate),
                        "cpu_ms_per_request": round(1e3 * cpu_s / requests, 4),
                        "p50_ms": got.p50_ms,
                        "p99_ms": got.p99_ms,
                        "failed": got.failed,
                        "cpu_s_by_process": by_name,
                    }
                )
            say(
                f"  round {number + 1}/{rounds}: "
                + ", ".join(
                    f"{name} {runs[-1]['requests_per_s']}/s {runs[-1]['cpu_ms_per_request']:.3f} ms"
                    for name, runs in found.items()
                )
            )
        strangers_cores = watch.cores()
    keys = ("requests_per_s", "cpu_ms_per_request", "p50_ms", "p99_ms", "failed")
    figures: dict[str, Any] = {
        name: {key: round(median(run[key] for run in runs), 4) for key in keys}
        | {"cpu_s_by_process": runs[-1]["cpu_s_by_process"]}
        for name, runs in found.items()
    }
    for name in ("noop", "tensor_noop"):
        figures[name]["cpu_of_echo"] = round(
            median(
                run["cpu_ms_per_request"] / echo["cpu_ms_per_request"]
                for run, echo in zip(found[name], found["echo"], strict=True)
            ),
            3,
        )
    figures["idle_cores"] = round(idle_cores, 4)
    figures["strangers_cores"] = round(strangers_cores, 3)
    return Report(
        "noop",
        figures,
        [most("noop.cpu_ms_per_request", 0.8), most("tensor_noop.cpu_ms_per_request", 0.8)],
        {
            "applications": [entry.get("args", {}) for entry in applications],
            "connections": 32,
            "client": client_name(),
            "round_s": duration_s,
        },
        is_short,
    )


def _served(server: Server, name: str) -> int | None:
    """Items that the application's replica has run; None where it can't tell (the echo)."""
    app = {"noop": "noop", "tensor_noop": "tensor"}.get(name)
    return None if app is None else int(server.stats(app)["totals"]["items"])
