"""Models that must not be shared, under `safety: auto` and, to see that it matters, as `shared`.

10,000 concurrent requests each; an answer is wrong when it is not what the model gives alone.
"""

import random
from typing import Any

from deployments.runtime.adapter import Adapter, load_class
from scripts.bench.arrivals import by_status, count
from scripts.bench.client import Plan, Sample, run_load
from scripts.bench.endpoint import Endpoint, ours
from scripts.bench.report import Report, least, most, say
from scripts.bench.server import Server, application

MODELS = ("Scratch", "Global")
CONNECTIONS = 64


def run(*, is_short: bool) -> Report:
    requests = 500 if is_short else 10_000
    figures: dict[str, Any] = {}
    for name in MODELS:
        target = f"scripts.bench.unsafe_models:{name}"
        careful = application("careful", target, slots=4, safety="auto")
        careless = application("careless", target, slots=4, safety="shared", max_batch_size=1)
        with Server(careful, careless) as server:
            figures[name] = {
                "auto": _ask(server, name, "careful", requests),
                "shared": _ask(server, name, "careless", requests),
            }
            safety = server.stats("careful")["safety"]
        figures[name]["auto"] |= {"mode": safety["mode"], "verdict": safety["verdict"]}
        say(f"  {name}: {figures[name]}")
    targets = [most(f"{name}.auto.wrong", 0) for name in MODELS]
    targets += [most(f"{name}.auto.failed", 0) for name in MODELS]
    # Without the first nothing would be shown by the others.
    targets.append(least("Scratch.shared.wrong", 1))
    return Report("unsafe", figures, targets, {"slots": 4, "connections": CONNECTIONS}, is_short)


def _ask(server: Server, model: str, app: str, requests: int) -> dict[str, Any]:
    source = random.Random(7)
    items = [round(source.uniform(-2.0, 2.0), 3) for _ in range(requests)]
    endpoint = ours(app)
    shots = [endpoint.shot(item, tag=repr(item)) for item in items]
    load = run_load(Plan(server.port, shots, connections=CONNECTIONS, keeps_bodies=True))
    right = _Right(model)
    answered = [sample for sample in load.samples if sample.status == 200]
    return {
        "requests": requests,
        "wrong": count(answered, lambda sample: not right.is_right(endpoint, sample)),
        "failed": requests - len(answered),
        "by_status": by_status(load.samples),
    }


class _Right:
    """What the model gives alone, one item after the other, in this process."""

    def __init__(self, model: str) -> None:
        self._adapter = Adapter(load_class(f"scripts.bench.unsafe_models:{model}"), {})
        self._adapter.load("cpu")

    def is_right(self, endpoint: Endpoint, sample: Sample) -> bool:
        (raw,) = self._adapter.forward_batch([self._adapter.preprocess(float(sample.tag))])
        right = self._adapter.postprocess(raw)
        found = endpoint.value(sample)
        return len(found) == len(right) and all(abs(a - b) < 1e-3 for a, b in zip(found, right, strict=True))
