"""One open stream: input and output at the same time, until one of them ends it.

Owns: the task that reads from the client and the one that writes to it, back-pressure between client
and engine in both directions, the time-outs of a stream. Must not know: HTTP framing,
WebSocket messages (they are the Wire's), what the bytes mean.

Plain ASGI, with a single caller of `receive`: Starlette's StreamingResponse watches for disconnects on the
same channel and swallows every second chunk of the request. What a stream holds here: the chunk being
fed and the outputs being sent.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any, Protocol

from deployments.core.contract import Limits, OutputStream
from deployments.core.errors import (
    ClientLeft,
    MalformedRequest,
    ModelBroken,
    ServingError,
    StreamTimeout,
)
from serve_app.http.body import IN_HAND
from serve_app.http.exchange import Call, encode_json

FEED_BYTES = 64 * 1024
"""Input goes to the engine in pieces of at most this: one message may have 16 MiB, and cutting that into
chunks in one go would stop the event loop. The bytes of longer messages count as bodies in hand."""

OPEN_AFTER_S = 0.05
"""The answer begins with the first output or error, but no later than this: clients that wait for the
head before they send on (fetch, requests) would wait for ever where no output can come before it. An
error later than this finds the status 200 already sent; those at the door take under 1 ms."""


class Wire(Protocol):
    """The client's end of a stream."""

    async def open(self) -> None:
        """Tell the client that the stream is open; once, however often it is called."""
        ...

    async def receive(self) -> tuple[bytes, bool]:
        """The next input, and whether the input ends with it. After the end: waits for what must not
        come. Raises ClientLeft, or a CallerError for what is no input."""
        ...

    async def send(self, outputs: Sequence[Any]) -> None:
        """Send all outputs, opening the stream first; waits while the client is slow."""
        ...


class Watch:
    """The time-outs of one stream, by one timer for all: a timer a message costs 2 us of the 16 that
    a message takes.

    input_since, output_since: when the wait for the client to send, or to take what is sent, began (the
    loop's clock), infinite while there is no such wait. expired: its result is the error to raise.
    """

    __slots__ = ("_end", "_limits", "_loop", "_timer", "expired", "input_since", "output_since")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self.expired: asyncio.Future[ServingError] = self._loop.create_future()
        self.input_since = self.output_since = math.inf
        self._end = self._loop.time() + limits.max_stream_s
        self._timer = self._loop.call_later(min(limits.idle_timeout_s, limits.max_stream_s), self._check)

    def now(self) -> float:
        return self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now, idle_s = self._loop.time(), self._limits.idle_timeout_s
        error: ServingError | None = None
        if now >= self._end:
            error = StreamTimeout(f"the stream was open for {self._limits.max_stream_s:g} s (max_stream_s)")
        elif now >= self.output_since + idle_s:
            error = ClientLeft(f"the client took nothing for {idle_s:g} s (idle_timeout_s)")
        elif now >= self.input_since + idle_s:
            error = StreamTimeout(f"no input came for {idle_s:g} s (idle_timeout_s); end it, or keep sending")
        if error is not None:
            self.expired.set_result(error)
            return
        # A wait that begins from now on is over in idle_s at the earliest.
        due = min(self._end, min(self.output_since, self.input_since, now) + idle_s)
        self._timer = self._loop.call_at(due, self._check)


class Duplex:
    """Carries one stream between its client and the engine."""

    def __init__(self, stream: OutputStream, wire: Wire, call: Call, limits: Limits) -> None:
        self._stream = stream
        self._wire = wire
        self._call = call
        self._watch = Watch(limits)

    async def run(self, *, has_input: bool) -> None:
        """Return when all outputs are sent; raise the ServingError that ended the stream earlier.

        has_input False: nothing is to come from the client but its leaving. However this ends, the
        stream is closed and no task is left.
        """
        reader = asyncio.ensure_future(self._read(has_input))
        writer = asyncio.ensure_future(self._write())
        running: list[asyncio.Future[Any]] = [reader, writer, self._watch.expired]
        try:
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait(running, timeout=OPEN_AFTER_S, return_when=first)
            if not done:
                await self._wire.open()
                done, _ = await asyncio.wait(running, return_when=first)
            self._raise_first(done, reader, writer)
        finally:
            self._stream.close()
            self._watch.stop()
            for future in running:
                future.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _raise_first(
        self, done: set[asyncio.Future[Any]], reader: asyncio.Future[None], writer: asyncio.Future[None]
    ) -> None:
        """All outputs sent is success, whatever else happened; else the client's end says why."""
        if writer in done and writer.exception() is None:
            return
        if self._watch.expired in done:
            raise self._watch.expired.result()
        (reader if reader in done else writer).result()

    async def _read(self, is_open: bool) -> None:
        """Feed what comes; never returns, so that the client's leaving is seen to the end, and raised
        before anything else ends the stream."""
        watch, wire = self._watch, self._wire
        is_taken = True
        while True:
            watch.input_since = watch.now() if is_open else math.inf
            data, is_last = await wire.receive()
            watch.input_since = math.inf
            if data and not is_open:
                raise MalformedRequest("there is data behind the end of the input; open another stream")
            is_taken = is_taken and await self._feed(data)
            if is_last and is_open:
                is_open = False
                self._stream.end_input()

    async def _feed(self, data: bytes) -> bool:
        """False: the stream has ended with an error; the writer meets it behind the last output. Raises
        Overloaded where the bodies in hand leave no room."""
        is_big = len(data) > FEED_BYTES
        if is_big:
            IN_HAND.take(len(data), self._call)
        try:
            for start in range(0, len(data), FEED_BYTES):
                await self._stream.feed(data[start : start + FEED_BYTES])
        except ServingError:
            return False
        finally:
            if is_big:
                IN_HAND.give_back(self._call)
        return True

    async def _write(self) -> None:
        watch, wire = self._watch, self._wire
        while outputs := await self._stream.read():
            watch.output_since = watch.now()
            await wire.send(outputs)
            watch.output_since = math.inf


def encoded(output: Any) -> bytes:
    """One output as JSON without line breaks, or ModelBroken."""
    try:
        return encode_json(output)
    except Exception as error:
        raise ModelBroken.of("the model's output is no JSON value", error) from None
