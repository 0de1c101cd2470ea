"""LitServe (lightning.ai/docs/litserve): one worker, batches after 10 ms.

Environment: BENCH_MODEL, BENCH_PORT, BENCH_TIMEOUT_S (empty: its default of 30 s).
"""

import os
from typing import Any

import litserve as ls  # type: ignore[import-not-found]

from scripts.bench.peers import work

MODEL = os.environ["BENCH_MODEL"]


class Api(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.run = work.make(MODEL)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return request["input"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: list[Any]) -> list[Any]:
        return self.run(batch)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"output": output}


if __name__ == "__main__":
    server = ls.LitServer(
        Api(max_batch_size=work.batch_size(MODEL), batch_timeout=0.01),
        accelerator="cpu",
        workers_per_device=1,
        timeout=float(os.environ.get("BENCH_TIMEOUT_S") or 30),
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
    )
