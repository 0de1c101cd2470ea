"""The baseline of `latebinding`: the same sleeping model behind `@serve.batch` as its docs show it."""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.5})
class PlainBatch:
    """40 + 2n ms a batch, batches of up to 32, every other setting of @serve.batch its default."""

    @serve.batch(max_batch_size=32)  # type: ignore[untyped-decorator]
    async def _run(self, items: list[float]) -> list[float]:
        await asyncio.sleep((40.0 + 2.0 * len(items)) / 1e3)
        return [2.0 * item + 1.0 for item in items]

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"outputs": [await self._run(body["inputs"][0])]}


app = PlainBatch.bind()  # type: ignore[attr-defined]
