"""BentoML (docs.bentoml.com): one worker, its adaptive batching.

Environment: BENCH_MODEL, BENCH_TIMEOUT_S (empty: max_latency_ms is its default of 60 s).
"""

import os
from typing import Any

import bentoml  # type: ignore[import-not-found]

from scripts.bench.peers import work

MODEL = os.environ["BENCH_MODEL"]
MAX_LATENCY_MS = round(1e3 * float(os.environ.get("BENCH_TIMEOUT_S") or 60))


@bentoml.service(workers=1, traffic={"timeout": 60})
class Model:
    def __init__(self) -> None:
        self.run = work.make(MODEL)

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=work.batch_size(MODEL), max_latency_ms=MAX_LATENCY_MS
    )
    def predict(self, inputs: list[Any]) -> list[Any]:
        return self.run(inputs)
