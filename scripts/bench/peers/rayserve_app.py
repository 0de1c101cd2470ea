"""Ray Serve alone: `@serve.batch` in one deployment, 50 ms wait (its 10 ms default is far worse here).

Environment: BENCH_MODEL, BENCH_PORT, BENCH_TIMEOUT_S (set: requests beyond what can be answered in
that time are turned away by max_ongoing_requests and max_queued_requests).
"""

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from scripts.bench.peers import work

MODEL = os.environ["BENCH_MODEL"]
TIMEOUT_S = os.environ.get("BENCH_TIMEOUT_S")


@serve.deployment
class Model:
    def __init__(self, model: str) -> None:
        self._thread = ThreadPoolExecutor(1)  # the loop stays free while the model runs
        self._run = self._thread.submit(work.make, model).result()

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=work.batch_size(MODEL), batch_wait_timeout_s=0.05
    )
    async def _batch(self, items: list[Any]) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"output": await self._batch(body["input"])}


def main() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    bounds: dict[str, int] = {"max_ongoing_requests": 4096}
    if TIMEOUT_S:
        # What fits into the time: so many batches, two of them running or being formed.
        items = int(float(TIMEOUT_S) / 0.1) * work.batch_size(MODEL)
        bounds = {"max_ongoing_requests": items - work.batch_size(MODEL), "max_queued_requests": 8}
    serve.run(Model.options(**bounds).bind(MODEL), route_prefix="/predict")  # type: ignore[attr-defined]
    print("READY", flush=True)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
