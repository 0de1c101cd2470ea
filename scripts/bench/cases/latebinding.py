"""When membership of a batch is decided: a model of 40 + 2n ms under Poisson load, open loop.

The baseline, in the same server, is @serve.batch as its documentation shows it: it forms a batch when
its wait runs out and only then looks for a slot, so under-filled batches queue up.
"""

from typing import Any

from scripts.bench.arrivals import after, by_status, lag_ms, latency_ms, poisson
from scripts.bench.client import Plan, run_load
from scripts.bench.endpoint import Endpoint, ours
from scripts.bench.report import Report, most, say
from scripts.bench.server import Server, application, plain_application

WARM_UP_S = 3.0
BOUND_MS = {150: 120.0, 5: 50.0}


def run(*, is_short: bool) -> Report:
    config = application("sleep", "scripts.bench.models:Sleep", model_args={"base_ms": 40.0, "item_ms": 2.0})
    figures: dict[str, Any] = {}
    baseline = Endpoint("/plain/", ours("x").wrap, ours("x").unwrap)
    with Server(config, plain_application("plain", "scripts.bench.plain_batch:app")) as server:
        for rate in BOUND_MS:
            duration_s = WARM_UP_S + (4.0 if is_short else 30.0)
            for name, endpoint in (("ours", ours("sleep")), ("serve_batch", baseline)):
                shots = [endpoint.shot(1.0, at_s=at_s) for at_s in poisson(rate, duration_s, seed=7)]
                load = run_load(Plan(server.port, shots))
                kept = after(load.samples, WARM_UP_S)
                figures[f"{name}_{rate}"] = {
                    "p50_ms": latency_ms(kept, 0.5),
                    "p99_ms": latency_ms(kept, 0.99),
                    "by_status": by_status(kept),
                    "client_lag_ms_p99": lag_ms(kept),
                }
                say(f"  {name} at {rate}/s: {figures[f'{name}_{rate}']}")
    return Report(
        "latebinding",
        figures,
        [most(f"ours_{rate}.p50_ms", bound) for rate, bound in BOUND_MS.items()],
        {"application": config["args"], "rates_per_s": list(BOUND_MS), "duration_s": duration_s, "seed": 7},
        is_short,
    )
