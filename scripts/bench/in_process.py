"""A replica's service without Ray and HTTP, in a process of its own: for figures of memory.

Owns: that process, a closed loop of items through the service. Must not know: what is measured.
"""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from deployments.core.contract import Limits, Outcome, RequestOptions
from deployments.runtime.adapter import Adapter, load_class
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing

Work = Callable[[ModelService], Awaitable[dict[str, Any]]]


def in_own_process(work: Work, target: str, limits: Limits, sharing: Sharing) -> dict[str, Any]:
    """What `work`, a function of a module, returns; the service is started before and closed after it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(theirs, work, target, limits, sharing))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {target} ended with {process.exitcode}") from None
    process.join()
    return found


def _main(pipe: Any, work: Work, target: str, limits: Limits, sharing: Sharing) -> None:
    pipe.send(asyncio.run(_serve(work, target, limits, sharing)))


async def _serve(work: Work, target: str, limits: Limits, sharing: Sharing) -> dict[str, Any]:
    async def decide(_: Adapter) -> Sharing:
        return sharing

    service = ModelService("bench", lambda: Adapter(load_class(target), {}), limits)
    await service.start("cpu", decide=decide)
    try:
        return await work(service)
    finally:
        service.close()


async def closed_loop(service: ModelService, items: Sequence[Any], clients: int) -> list[Outcome]:
    """Every item once, `clients` at a time; outcomes in the order of items."""
    outcomes: list[Outcome | None] = [None] * len(items)
    waiting = iter(range(len(items)))

    async def client() -> None:
        for index in waiting:
            answer = await service.predict([items[index]], RequestOptions())
            outcomes[index] = answer.outcomes[0]

    await asyncio.gather(*(client() for _ in range(clients)))
    return [outcome for outcome in outcomes if outcome is not None]
