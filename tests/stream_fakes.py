"""A fake streaming service: an "engine" that answers each chunk of bytes at once, errors on demand.

Streams.CHUNKS: every CHUNK bytes give {"chunk": i}; a chunk that begins with b"!" and a name of ERRORS
ends the stream with that error, b"!value" gives an output that is no JSON, b"!done" ends it well.
Streams.REQUEST: {"count": n} gives n outputs; "error" names what comes behind them.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from deployments.core import errors
from deployments.core.contract import Limits, ModelCard, OutputStream, RequestOptions, Streams
from tests.http_fakes import FakeService

CHUNK = 64

ERRORS: dict[str, Callable[[], Exception]] = {
    "invalid": lambda: errors.InvalidItem("an odd count of bytes"),
    "model": lambda: errors.ModelFailed("the model failed on this stream"),
    "drain": lambda: errors.Draining("this server is stopping"),
    "late": lambda: errors.DeadlinePassed("not begun by its deadline"),
    "bug": lambda: RuntimeError("secret detail"),
}


def chunk(text: str = "") -> bytes:
    """One chunk that says `text`."""
    return text.encode().ljust(CHUNK, b".")


def card_of(streams: Streams) -> ModelCard:
    schema = {"type": "object", "properties": {"chunk": {"type": "integer"}}}
    return ModelCard(name="echo", inputs=(), outputs=(), streams=streams, output_schema=schema)


class FakeStream:
    """An OutputStream with at most `service.max_unread` outputs unread; feed waits for more room."""

    def __init__(self, service: "FakeStreamingService") -> None:
        self._service = service
        self._rest = bytearray()
        self._outputs: deque[Any] = deque()
        self._error: Exception | None = None
        self._is_done = False
        self._changed = asyncio.Event()
        self.fed_bytes = 0
        self.is_closed = False
        self.produced = 0

    async def read(self) -> Sequence[Any]:
        while not self._outputs and not self._is_done and self._error is None:
            await self._wait()
        ready = list(self._outputs)
        self._outputs.clear()
        self._wake()
        if not ready and self._error is not None:
            raise self._error
        return ready

    async def feed(self, data: bytes) -> None:
        self.fed_bytes += len(data)
        self._rest += data
        while len(self._rest) >= CHUNK:
            while len(self._outputs) >= self._service.max_unread or not self._service.runs.is_set():
                await self._wait() if self._service.runs.is_set() else await self._service.runs.wait()
            if self._error is not None:
                raise self._error
            one = bytes(self._rest[:CHUNK])
            del self._rest[:CHUNK]
            self._step(one)

    def _step(self, one: bytes) -> None:
        word = one[1:].rstrip(b".").decode() if one.startswith(b"!") else ""
        if word in ERRORS:
            self._error = ERRORS[word]()
        elif word == "done":
            self._is_done = True
        elif not self._is_done:
            self.put(object() if word == "value" else {"chunk": self.produced})
        self._wake()

    def put(self, output: Any) -> None:
        self._outputs.append(output)
        self.produced += 1
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def end_input(self) -> None:
        if self._rest:
            self.put({"rest": len(self._rest)})
        self._is_done = True
        self._wake()

    def close(self) -> None:
        self.is_closed = self._is_done = True
        self._wake()  # as the engine's: who reads it is not left waiting
        self._service.open.discard(self)
        self._service.closed.set()

    def _wake(self) -> None:
        self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class FakeStreamingService(FakeService):
    """The StreamingService Protocol; keeps its streams. `runs` cleared: the engine stands still."""

    def __init__(self, streams: Streams = Streams.CHUNKS, limits: Limits | None = None) -> None:
        super().__init__(card_of(streams), limits or Limits(max_streams=256, max_body_bytes=1 << 20))
        self.open: set[FakeStream] = set()
        self.streams: list[FakeStream] = []
        self.options: list[RequestOptions] = []
        self.max_unread = 64
        self.runs = asyncio.Event()
        self.runs.set()
        self.closed = asyncio.Event()

    def open_stream(self, item: Any, options: RequestOptions) -> OutputStream:
        if len(self.open) >= self.limits.max_streams:
            raise errors.Overloaded("as many streams as this replica takes are open", retry_after_s=7)
        stream = FakeStream(self)
        if item is not None:
            if not isinstance(item, dict) or not isinstance(item.get("count"), int):
                raise errors.InvalidItem("the request must have a count")
            for _ in range(item["count"]):
                stream.put({"step": stream.produced})
            if "error" in item:
                stream.fail(ERRORS[item["error"]]())
            elif not item.get("endless"):
                stream.end_input()
        self.open.add(stream)
        self.streams.append(stream)
        self.options.append(options)
        return stream
