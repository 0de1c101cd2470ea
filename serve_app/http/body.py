"""Reading a request's body: whole, within its limits, decompressed.

Owns: `max_body_bytes` (by Content-Length before a byte is read, by counting where there is none), the
stall timeout, gzip and deflate with protection against decompression bombs, clients that leave
half-way. Must not know: what the bytes mean.

Content-Encoding per RFC 9110, 8.4.1: "deflate" is the zlib format, but bare deflate streams are sent
under that name too, so both are read.
"""

import asyncio
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from starlette.types import Receive

from deployments.core.errors import (
    BodyStalled,
    ClientLeft,
    MalformedRequest,
    RequestTooLarge,
    UnsupportedMedia,
)

STALL_TIMEOUT_S = 5.0
"""Longest pause between two chunks of a body. HAProxy guards bodies with a length itself; chunked
uploads, and servers without HAProxy, have only this."""

THREAD_FROM_BYTES = 16 * 1024
"""Compressed bodies from this size are inflated in a thread: at deflate's best ratio (1000:1) that is
16 MiB out, 10 to 40 ms in which the event loop would stand still."""

MAX_GZIP_MEMBERS = 16
"""Each member costs a copy of all that follows: a body of 20-byte members would take minutes."""


class StallGuard:
    """`with StallGuard():` raises BodyStalled inside when the block takes longer than the timeout.

    asyncio.timeout is not there in Python 3.10, and wait_for makes a task of each chunk there.
    """

    __slots__ = ("_fired", "_task", "_timer")

    def __enter__(self) -> None:
        self._fired = False
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task
        self._timer = asyncio.get_running_loop().call_later(STALL_TIMEOUT_S, self._fire)

    def _fire(self) -> None:
        self._fired = True
        self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if not self._fired or kind is not asyncio.CancelledError:
            return
        # Somebody else's cancel that came at the same moment goes first (Python >= 3.11 counts them).
        uncancel = getattr(self._task, "uncancel", None)
        if uncancel is None or uncancel() == 0:
            raise BodyStalled(f"the request's body stopped for {STALL_TIMEOUT_S:g} s") from None


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is over {limit} bytes (max_body_bytes); send less at once")


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """The whole body, decompressed; never more than `limit` bytes of it in memory, before and after.

    Raises RequestTooLarge, BodyStalled, UnsupportedMedia, MalformedRequest, or ClientLeft.
    """
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    with StallGuard():
        message = await receive()
    if message["type"] != "http.request":
        raise ClientLeft("the client left while it sent its body")
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        body = await _read_rest(receive, body, limit)
    if len(body) > limit:
        raise _too_large(limit)
    encoding = headers.get(b"content-encoding")
    if encoding is None:
        return body
    return await _decompressed(body, encoding, limit)


async def _read_rest(receive: Receive, first: bytes, limit: int) -> bytes:
    chunks = [first]
    size = len(first)
    is_open = True
    while is_open:
        with StallGuard():
            message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft("the client left while it sent its body")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        is_open = message.get("more_body", False)
    return b"".join(chunks)


async def _decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    name = encoding.strip().lower().decode("latin-1")
    if name in ("identity", ""):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMedia(f"content-encoding {name[:40]!r} is not read; use gzip or deflate")
    if len(body) < THREAD_FROM_BYTES:
        return inflate(body, name, limit)
    return await asyncio.to_thread(inflate, body, name, limit)


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Decompress at most `limit` bytes out of `body`; a gzip body may have a few members."""
    parts: list[bytes] = []
    size = 0
    rest = body
    try:
        while rest:
            if len(parts) == MAX_GZIP_MEMBERS:
                raise MalformedRequest(f"the gzip body has over {MAX_GZIP_MEMBERS} members")
            reader = zlib.decompressobj(_window_bits(encoding, rest))
            part = reader.decompress(rest, limit - size + 1)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if not reader.eof:
                raise MalformedRequest(f"the {encoding} body is cut short")
            parts.append(part)
            rest = reader.unused_data
            if rest and encoding == "deflate":
                raise MalformedRequest("there is data behind the end of the deflate body")
    except zlib.error:
        raise MalformedRequest(f"the body is not valid {encoding}") from None
    return b"".join(parts)


def _window_bits(encoding: str, data: bytes) -> int:
    """31: gzip; 15: zlib format; -15: bare deflate (first byte is no zlib header, RFC 1950, 2.2)."""
    if encoding != "deflate":
        return 31
    is_zlib = len(data) >= 2 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
    return 15 if is_zlib else -15
