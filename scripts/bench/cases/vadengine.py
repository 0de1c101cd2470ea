"""silero-vad in the engine, without HTTP: how many real-time streams do the cores carry?

The replica's own service (engine, streams, back-pressure, JSON values) in one process. Each stream has a
message of 320 ms waiting whenever the engine can take it; results a second over 31.25 are streams. One by
one is beside it: the same with a single stream.
"""

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

from scripts.bench.audio_streams import FRAME, FRAMES_IN_MESSAGE, MESSAGE_S, MODEL, RATE, SLOTS, audio
from scripts.bench.report import Report, least, say

STREAMS = SLOTS
FRAMES_A_S = RATE / FRAME


def run(*, is_short: bool) -> Report:
    rounds, duration_s = (1, 2.0) if is_short else (5, 8.0)
    found: list[dict[str, float]] = []
    for number in range(rounds):
        found.append({"many": _elsewhere(STREAMS, duration_s), "alone": _elsewhere(1, duration_s / 2)})
        say(f"  round {number + 1}/{rounds}: {found[-1]}")
    return Report(
        "vadengine",
        {
            "real_time_streams": round(median(one["many"] for one in found), 1),
            "one_by_one": round(median(one["alone"] for one in found), 1),
            "rounds": found,
        },
        [least("real_time_streams", 800)],
        {"model": MODEL, "streams": STREAMS, "message_s": MESSAGE_S, "duration_s": duration_s},
        is_short,
    )


def _elsewhere(streams: int, duration_s: float) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_here, streams, duration_s).result()


def _here(streams: int, duration_s: float) -> float:
    return asyncio.run(_measure(streams, duration_s))


async def _measure(streams: int, duration_s: float) -> float:
    """Real-time streams' worth of results in the second half of duration_s."""
    from deployments.core.contract import Limits, RequestOptions
    from deployments.runtime.continuous import ContinuousService
    from deployments.runtime.fronts import Place, front_of
    from deployments.runtime.model_class import load_class

    service = ContinuousService(
        "vad", front_of(load_class(MODEL), {}), Limits(max_sequences=SLOTS, max_streams=SLOTS)
    )
    await service.start(Place("cpu"), len(os.sched_getaffinity(0)))
    opened = [service.open_stream(None, RequestOptions()) for _ in range(streams)]
    piece, counts = audio(MESSAGE_S), [0]
    tasks = [asyncio.ensure_future(_talk(stream, piece, counts)) for stream in opened]
    loop = asyncio.get_running_loop()
    await asyncio.sleep(duration_s / 2)
    began_s, before = loop.time(), counts[0]
    await asyncio.sleep(duration_s / 2)
    results_per_s = (counts[0] - before) / (loop.time() - began_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await service.close()
    return round(results_per_s / FRAMES_A_S, 1)


async def _talk(stream: Any, piece: bytes, counts: list[int]) -> None:
    """One message ahead of the results, always: the engine never waits for this stream."""
    await stream.feed(piece)
    fed = read = 0
    while True:
        await stream.feed(piece)
        fed += FRAMES_IN_MESSAGE
        while read < fed:
            results = len(await stream.read())
            counts[0] += results
            read += results
