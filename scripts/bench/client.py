"""A light HTTP/1.1 load client: open or closed loop, clients that give up by closing the connection.

Owns: connections, send times, latencies. Must not know: what is asked or answered. It runs in a
process of its own (`run_load`), on uvloop where there is one: about 0.05 ms of CPU a request, so that
on a machine shared with the server it takes little, and its own lag is reported beside every result.

Open loop: requests leave at their intended times whatever the server does, and latency counts from
the intended time (Schroeder et al., "Open Versus Closed", NSDI 2006; Tene on coordinated omission).
"""

import asyncio
import multiprocessing
import re
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

GAVE_UP = 0
"""Status of a request whose client closed the connection before the answer."""
BROKEN = -1
"""Status of a request whose connection was refused, or ended without a whole answer."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, whole, and when to send it. give_up_s: close the connection so long after."""

    payload: bytes
    at_s: float = 0.0
    give_up_s: float | None = None
    tag: str = ""


@dataclass(slots=True)
class Sample:
    """What became of a shot. at_s is its intended time; lag_s how late the client itself sent it."""

    tag: str
    at_s: float
    status: int
    latency_s: float
    lag_s: float = 0.0
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Plan:
    """connections 0: open loop, as many as needed. Otherwise so many send one after the other.

    duration_s: a closed loop goes round the shots until then; None: through them once.
    batch_size: of an open loop that waits for whole batches: what has come by then, so many at most,
    leaves together, and the next when all of them have ended; lag_s holds that wait. 0: no such batches.
    """

    port: int
    shots: Sequence[Shot]
    connections: int = 0
    duration_s: float | None = None
    keeps_bodies: bool = False
    batch_size: int = 0
    host: str = "127.0.0.1"


@dataclass(slots=True)
class Load:
    """samples are in order of their end. busy_share: the client's own CPU over the time it took."""

    samples: list[Sample] = field(default_factory=list)
    wall_s: float = 0.0
    busy_share: float = 0.0


def request(
    path: str,
    body: bytes,
    *,
    content_type: str = "application/json",
    headers: str = "",
    method: str = "POST",
) -> bytes:
    """The bytes of one HTTP request; `headers` are whole lines ending in CRLF."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def run_load(plan: Plan) -> Load:
    """Carry out `plan` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run_here, plan).result()


def run_here(plan: Plan) -> Load:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_Driver(plan).run())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Driver(plan).run())


class _Driver:
    """Sends a plan's shots; owns the pool of idle connections."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.idle: list[_Connection] = []
        self.samples: list[Sample] = []
        self._held: deque[tuple[Shot, float]] = deque()  # for the next whole batch
        self._under_way = 0  # of a whole batch
        self._unfinished = 0
        self._next = 0
        self._finished = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()
        self.began = 0.0

    async def run(self) -> Load:
        self.loop = asyncio.get_running_loop()
        cpu_s = time.process_time()
        self.began = self.loop.time()
        await (self._closed_loop() if self._plan.connections else self._open_loop())
        wall_s = self.loop.time() - self.began
        for connection in self.idle:
            connection.close()
        return Load(self.samples, wall_s, (time.process_time() - cpu_s) / max(wall_s, 1e-9))

    async def _open_loop(self) -> None:
        self._unfinished = len(self._plan.shots)
        for shot in sorted(self._plan.shots, key=lambda shot: shot.at_s):
            delay_s = self.began + shot.at_s - self.loop.time()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            self._held.append((shot, self.began + shot.at_s))
            self._release()
        await self._finished.wait()

    def _release(self) -> None:
        """Send what waits; nobody joins a whole batch that is under way."""
        if self._under_way:
            return
        for _ in range(min(len(self._held), self._plan.batch_size or len(self._held))):
            self._under_way += self._plan.batch_size > 0
            self._launch(*self._held.popleft())

    async def _closed_loop(self) -> None:
        self._unfinished = self._plan.connections
        for _ in range(self._plan.connections):
            self._launch_next()
        await self._finished.wait()

    def _launch_next(self) -> None:
        shots, duration_s = self._plan.shots, self._plan.duration_s
        now = self.loop.time()
        is_over = self._next >= len(shots) if duration_s is None else now - self.began >= duration_s
        if is_over:
            self._end_one()
            return
        shot = shots[self._next % len(shots)]
        self._next += 1
        self._launch(shot, now)

    def _launch(self, shot: Shot, due: float) -> None:
        while self.idle:
            connection = self.idle.pop()
            if connection.is_open:
                connection.fire(shot, due)
                return
        task = self.loop.create_task(self._connect(shot, due))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, shot: Shot, due: float) -> None:
        try:
            _, connection = await self.loop.create_connection(
                lambda: _Connection(self), self._plan.host, self._plan.port
            )
        except OSError:
            now = self.loop.time()
            self.ended(Sample(shot.tag, due - self.began, BROKEN, now - due))
            return
        connection.fire(shot, due)

    def ended(self, sample: Sample) -> None:
        if not self._plan.keeps_bodies:
            sample.body = b""
        self.samples.append(sample)
        if self._plan.connections:
            self._launch_next()
            return
        if self._plan.batch_size:
            self._under_way -= 1
            self._release()
        self._end_one()

    def _end_one(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            self._finished.set()


class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request in flight."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._shot: Shot | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._received = b""
        self._due = self._lag_s = 0.0
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.is_open = True

    def fire(self, shot: Shot, due: float) -> None:
        loop = self._driver.loop
        self._shot, self._due, self._received = shot, due, b""
        self._lag_s = loop.time() - due
        if shot.give_up_s is not None:
            self._timer = loop.call_at(due + shot.give_up_s, self._give_up)
        self._transport.write(shot.payload)

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    def _give_up(self) -> None:
        self.close()
        self._end(GAVE_UP)

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        if self._shot is None:
            return
        status_and_body = parse_response(self._received)
        if status_and_body is None:
            return
        status, body, is_last = status_and_body
        if is_last:
            self.close()
        else:
            self._driver.idle.append(self)
        self._end(status, body)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._shot is not None:
            self._end(BROKEN)

    def _end(self, status: int, body: bytes = b"") -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        shot, self._shot = self._shot, None
        assert shot is not None
        driver = self._driver
        latency_s = driver.loop.time() - self._due
        driver.ended(Sample(shot.tag, self._due - driver.began, status, latency_s, self._lag_s, body))


def parse_response(data: bytes) -> tuple[int, bytes, bool] | None:
    """(status, body, connection closes after it) of a whole response; None while it isn't whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head, body = data[: end + 2], data[end + 4 :]
    status, is_last = int(head[9:12]), _CLOSE.search(head) is not None
    length = _LENGTH.search(head)
    if length is not None:
        return (status, body, is_last) if len(body) >= int(length[1]) else None
    if _CHUNKED.search(head) is None:
        return status, b"", True  # ends with the connection; nobody here needs that body
    if not body.endswith(b"0\r\n\r\n"):
        return None
    return status, _unchunk(body), is_last


def _unchunk(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        parts.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(parts)
