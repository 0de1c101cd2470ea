"""A client of audio sockets: many WebSockets that send in real time, and ones that vanish.

Owns: send times, latencies of results, the audio. It runs in a process of its own (`follow`, `vanish`), on
uvloop: 400 sockets mean 1,250 messages a second out and their results in.
"""

import asyncio
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from deployments.core.figures import quantile
from scripts.bench.server import continuous
from scripts.bench.websocket import Socket, connect, frame

MODEL = "deployments.models.silero_vad:SileroVad"
SLOTS = 1024
"""Streams that have begun hold one, whether they have a chunk or not."""
RATE = 16_000
FRAME = 512
"""Samples that make one result."""
FRAMES_IN_MESSAGE = 10
MESSAGE_S = FRAMES_IN_MESSAGE * FRAME / RATE
LATE_S = 0.25
GRACE_S = 3.0
"""After the last message: what has not come by then counts as lost."""
_CONNECTING = 32

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Follow:
    """`count` sockets that each send a message every MESSAGE_S for duration_s, evenly out of phase.

    Results of messages sent before warm_up_s don't count.
    """

    port: int
    count: int
    duration_s: float
    warm_up_s: float = 5.0
    path: str = "/vad/ws"

    @property
    def messages(self) -> int:
        return round(self.duration_s / MESSAGE_S)

    @property
    def first(self) -> int:
        """The first message that counts."""
        return round(self.warm_up_s / MESSAGE_S)

    @property
    def due(self) -> int:
        """Results that must come."""
        return self.count * (self.messages - self.first) * FRAMES_IN_MESSAGE


@dataclass(slots=True)
class Followed:
    """latency: from a message's intended time to its result. in_time_share: of all that were due.

    lag_ms_p99: how late the client itself sent. closed: why sockets ended that should not have.
    """

    due: int = 0
    came: int = 0
    in_time_share: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    longest_gap_s: float = 0.0
    lag_ms_p99: float = 0.0
    closed: list[str] = field(default_factory=list)


def application() -> dict[str, Any]:
    return continuous("vad", MODEL, max_sequences=SLOTS, threads=1)  # as in config.yaml


def follow(plan: Follow) -> Followed:
    """Carry `plan` out in a process of its own."""
    return _elsewhere(follow_here, plan)


def vanish(port: int, count: int, seed: int) -> int:
    """`count` clients connect, stream and drop the connection at random; returns how many had results."""
    return _elsewhere(_vanish_here, port, count, seed)


def _elsewhere(function: Callable[..., Found], *arguments: object) -> Found:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def follow_here(plan: Follow) -> Followed:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_follow(plan))


def _vanish_here(port: int, count: int, seed: int) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_vanish(port, count, seed))


def audio(seconds: float, seed: int = 1) -> bytes:
    """Quiet noise, int16 little-endian mono: what it says does not change what it costs."""
    source = random.Random(seed)
    samples = (source.randint(-800, 800) for _ in range(round(seconds * RATE)))
    return b"".join(sample.to_bytes(2, "little", signed=True) for sample in samples)


async def _follow(plan: Follow) -> Followed:
    gate = asyncio.Semaphore(_CONNECTING)

    async def open_one() -> Socket:
        async with gate:
            return await connect(plan.port, plan.path)

    sockets = await asyncio.gather(*(open_one() for _ in range(plan.count)))
    began_s = asyncio.get_running_loop().time() + 0.1
    results = _Results(plan)
    for number, socket in enumerate(sockets):
        socket.on_results = results.watch(began_s + _phase_s(plan, number))
    lags_s = await _send_all(plan, sockets, began_s)
    try:
        await asyncio.wait_for(results.are_all_in.wait(), GRACE_S)
    except asyncio.TimeoutError:
        pass
    closed = [socket.closed for socket in sockets if socket.closed]
    for socket in sockets:
        socket.transport.abort()
    return summed_up(plan, results.latencies_s, lags_s, results.longest_gap_s, closed)


async def _send_all(plan: Follow, sockets: Sequence[Socket], began_s: float) -> list[float]:
    """In real time, whatever comes back; returns how late each message left."""
    loop = asyncio.get_running_loop()
    message, lags_s = frame(audio(MESSAGE_S)), []
    for turn in range(plan.messages):
        for number, socket in enumerate(sockets):
            due_s = began_s + turn * MESSAGE_S + _phase_s(plan, number)
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
            if not socket.closed:
                socket.transport.write(message)
            lags_s.append(loop.time() - due_s)
    return lags_s


def _phase_s(plan: Follow, number: int) -> float:
    return MESSAGE_S * number / plan.count


class _Results:
    """Latencies of what counts, and the longest silence of any socket."""

    def __init__(self, plan: Follow) -> None:
        self.latencies_s: list[float] = []
        self.longest_gap_s = 0.0
        self.are_all_in = asyncio.Event()
        self._plan = plan
        self._loop = asyncio.get_running_loop()

    def watch(self, began_s: float) -> Callable[[int], None]:
        """Results come in order: the one numbered k belongs to message k // FRAMES_IN_MESSAGE."""
        seen, last_s = 0, began_s

        def on_results(count: int) -> None:
            nonlocal seen, last_s
            now_s = self._loop.time()
            for number in range(seen, seen + count):
                turn = number // FRAMES_IN_MESSAGE
                if turn >= self._plan.first:
                    self.latencies_s.append(now_s - began_s - turn * MESSAGE_S)
            seen += count
            self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s
            if len(self.latencies_s) >= self._plan.due:
                self.are_all_in.set()

        return on_results


def summed_up(
    plan: Follow,
    latencies_s: Sequence[float],
    lags_s: Sequence[float],
    longest_gap_s: float,
    closed: Sequence[str],
) -> Followed:
    """What never came is as late as what came late."""
    ordered = sorted(latencies_s)
    in_time = sum(latency_s <= LATE_S for latency_s in ordered)
    return Followed(
        plan.due,
        len(ordered),
        round(in_time / plan.due, 5),
        round(1e3 * quantile(ordered, 0.5), 1),
        round(1e3 * quantile(ordered, 0.99), 1),
        round(longest_gap_s, 3),
        round(1e3 * quantile(sorted(lags_s), 0.99), 1),
        list(closed[:5]),
    )


async def _vanish(port: int, count: int, seed: int) -> int:
    source = random.Random(seed)
    message = frame(audio(MESSAGE_S))

    async def one(at_s: float, leave_s: float) -> int:
        await asyncio.sleep(at_s)
        try:
            socket = await connect(port, "/vad/ws")
        except (OSError, asyncio.TimeoutError):
            return 0
        for _ in range(int(leave_s / MESSAGE_S)):
            socket.transport.write(message)
            await asyncio.sleep(MESSAGE_S)
        await asyncio.sleep(leave_s % MESSAGE_S)
        socket.transport.abort()
        return socket.results

    visits = [(number / 20, source.uniform(0.0, 3.0)) for number in range(count)]
    results = await asyncio.gather(*(one(at_s, leave_s) for at_s, leave_s in visits))
    return sum(result > 0 for result in results)
