"""Nobody else there: what the way adds to one request. p50 over HTTP minus p50 in process.

Read `minilm` beside `strangers_cores`: two threads that meet at each operator wait for a core that
another program holds, in process most of all, and the difference may even be negative.
"""

from collections.abc import Callable
from typing import Any

from scripts.bench import inputs, offline
from scripts.bench.endpoint import ours
from scripts.bench.report import Report, most, say
from scripts.bench.saturate import client_name, saturate
from scripts.bench.server import Server, application
from scripts.bench.turns import Strangers


def run(*, is_short: bool) -> Report:
    duration_s = 2.0 if is_short else 8.0
    cases: dict[str, tuple[str, Any, Callable[[], offline.Passes]]] = {
        "noop": ("scripts.bench.models:Noop", 1.0, offline.one_noop),
        "minilm": ("deployments.models.minilm:MiniLM", inputs.short_text(), offline.one_text),
    }
    figures: dict[str, Any] = {}
    with Server(*(application(name, model) for name, (model, _, _) in cases.items())) as server:
        watch = Strangers()
        for name, (_, item, make) in cases.items():
            body = ours(name).body(item)
            added = []
            with offline.Reference(make) as alone:
                saturate(server.port, f"/{name}/predict", [body], connections=1, duration_s=2)
                for _ in range(1 if is_short else 3):
                    in_process_ms = alone.p50_ms(duration_s / 2)
                    got = saturate(
                        server.port, f"/{name}/predict", [body], connections=1, duration_s=duration_s
                    )
                    in_process_ms = (in_process_ms + alone.p50_ms(duration_s / 2)) / 2
                    added.append((got.p50_ms - in_process_ms, got.p50_ms, in_process_ms, got.p99_ms))
            added.sort()
            middle = added[len(added) // 2]
            keys = ("added_p50_ms", "http_p50_ms", "in_process_p50_ms", "http_p99_ms")
            figures[name] = dict(zip(keys, (round(value, 3) for value in middle), strict=True))
            say(f"  {name}: {figures[name]}")
        figures["strangers_cores"] = round(watch.cores(), 3)
    return Report(
        "idle",
        figures,
        [most(f"{name}.added_p50_ms", 1.5) for name in cases],
        {"connections": 1, "client": client_name(), "round_s": duration_s, "text_words": 16},
        is_short,
    )
