"""Writes of one turn of the event loop as one write to the socket.

Owns: a transport that gathers. Must not know: WebSocket, what is written. asyncio's transport makes a system
call of each write, and each wakes the proxy and the client: ten results of a step were ten. Measured with
330 streams of /vad: 0.4 of the event loop's time went into them, and results came after 99 ms, not 27.
"""

import asyncio
from typing import Any

MOST_BYTES = 64 * 1024
"""Gathered at once; back-pressure is the transport's own, and begins with what it has been given."""


class GatheredWrites:
    """A transport in front of another; all but writing and closing is the other's."""

    def __init__(self, transport: asyncio.BaseTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport: Any = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes >= MOST_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts, self._bytes = [], 0
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
