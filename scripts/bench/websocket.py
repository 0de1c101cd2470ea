"""A WebSocket client as light as can be: for hundreds of sockets on the cores that serve them.

Owns: the frames of RFC 6455 as far as this needs them. Messages are rendered once and sent as they are
(masked with a key of zero, which leaves the bytes alone), and results are counted, not parsed.
"""

import asyncio
from collections.abc import Callable

_TEXT, _CLOSE, _PING = 1, 8, 9
_MARK = b'"t_s"'
"""Once in every result, however many of them share a message."""


def frame(payload: bytes, opcode: int = 2) -> bytes:
    """One whole client frame."""
    if len(payload) < 126:
        head = bytes([0x80 | opcode, 0x80 | len(payload)])
    else:
        head = bytes([0x80 | opcode, 0x80 | 126]) + len(payload).to_bytes(2, "big")
    return head + bytes(4) + payload


def parse_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Whole frames of a server, as (opcode, payload), and the bytes that are left."""
    frames, at = [], 0
    while len(data) >= at + 2:
        length, body = data[at + 1] & 0x7F, at + 2
        if length >= 126:
            width = 2 if length == 126 else 8
            length, body = int.from_bytes(data[body : body + width], "big"), body + width
        if len(data) < body or len(data) < body + length:
            break
        frames.append((data[at] & 0x0F, data[body : body + length]))
        at = body + length
    return frames, data[at:]


class Socket(asyncio.Protocol):
    """One WebSocket; `on_results(n)` is called as results come."""

    def __init__(self, path: str) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_results: Callable[[int], None] = lambda count: None
        self.closed = ""
        self.results = 0
        self._path = path
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        head = (
            f"GET {self._path} HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        self.transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        if not self.opened.done():
            head, end, self._data = self._data.partition(b"\r\n\r\n")
            if not end:
                self._data = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(ConnectionError(head.decode(errors="replace")[:300]))
                return
            self.opened.set_result(None)
        frames, self._data = parse_frames(self._data)
        for opcode, payload in frames:
            self._take(opcode, payload)

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == _TEXT:
            count = payload.count(_MARK)
            if not count:
                self.closed = payload.decode(errors="replace")[:300]
            self.results += count
            self.on_results(count)
        elif opcode == _PING:
            self.transport.write(frame(payload, 10))
        elif opcode == _CLOSE:
            self.closed += f" close {int.from_bytes(payload[:2], 'big')} {payload[2:]!r}"
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = self.closed or f"connection lost: {error!r}"
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(self.closed))


async def connect(port: int, path: str) -> Socket:
    """Raises ConnectionError where the server refuses, with its words."""
    loop = asyncio.get_running_loop()
    _, socket = await loop.create_connection(lambda: Socket(path), "127.0.0.1", port)
    await asyncio.wait_for(socket.opened, 60)
    return socket
