"""mosec (mosecorg.github.io/mosec): one worker, batches after 10 ms.

Environment: BENCH_MODEL. `--port`, `--address` and `--timeout` are mosec's own arguments.
"""

import os
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]

from scripts.bench.peers import work

MODEL = os.environ["BENCH_MODEL"]


class Model(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.run = work.make(MODEL)

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"output": output} for output in self.run([one["input"] for one in data])]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=work.batch_size(MODEL), max_wait_time=10)
    server.run()
