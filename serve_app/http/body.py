"""Reading a request's body: whole, within its limits, decompressed.

Owns: `max_body_bytes` (by Content-Length before a byte is read, by counting where there is none), the
bytes of all bodies in hand together, asking for room before a big one is read, the stall timeout,
gzip and deflate with protection against decompression bombs, clients that leave half-way. Must not
know: what the bytes mean.

Content-Encoding per RFC 9110, 8.4.1: "deflate" is the zlib format, but bare deflate streams are sent
under that name too, so both are read.
"""

import asyncio
import zlib

from deployments.core.contract import Service
from deployments.core.errors import (
    BodyStalled,
    ClientLeft,
    MalformedRequest,
    Overloaded,
    RequestTooLarge,
    UnsupportedMedia,
)
from serve_app.http.exchange import Call
from serve_app.http.interruption import TimeLimit

STALL_TIMEOUT_S = 5.0
"""Longest pause between two chunks of a body. HAProxy guards bodies with a length itself; chunked
uploads, and servers without HAProxy, have only this."""

THREAD_FROM_BYTES = 16 * 1024
"""Compressed bodies from this size are inflated in a thread: at deflate's best ratio (1000:1) that is
16 MiB out, 10 to 40 ms in which the event loop would stand still."""

MAX_GZIP_MEMBERS = 16
"""Each member costs a copy of all that follows: a body of 20-byte members would take minutes."""


MAX_IN_HAND_BYTES = 256 * 1024 * 1024
"""Bodies in hand in this process, compressed and not, until their requests are answered: sixteen of
the longest allowed by default. Decoded JSON can be 24 times as big (a list for each `[],`)."""

ASK_FROM_BYTES = 256 * 1024
"""A body over this is not read before the queue says that it has room: reading and decoding it costs
a millisecond and more, which a refusal afterwards would waste."""

_MAX_DIGITS = 20
_DEFLATE_BEST = 1032
"""Most bytes that one byte of deflate can stand for (zlib's technical details)."""


class InHand:
    """Counts the bytes of all bodies that requests hold; one for the process."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0

    def check(self, size: int) -> None:
        """Raise Overloaded where `size` more would be too many."""
        if self.bytes + size > MAX_IN_HAND_BYTES:
            raise Overloaded(
                f"the bodies of the requests in hand are near {MAX_IN_HAND_BYTES} bytes", retry_after_s=1
            )

    def take(self, size: int, call: Call) -> None:
        """Hold `size` more bytes until the call ends, or raise Overloaded."""
        self.check(size)
        if not call.held_bytes:
            call.at_end = self.give_back
        call.held_bytes += size
        self.bytes += size

    def give_back(self, call: Call) -> None:
        self.bytes -= call.held_bytes
        call.held_bytes = 0


IN_HAND = InHand()


def is_size(text: bytes) -> bool:
    """A number of bytes as a header may say it: 5,000 digits are legal HTTP, and no int for Python."""
    return text.isdigit() and len(text) <= _MAX_DIGITS


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is over {limit} bytes (max_body_bytes); send less at once")


async def read_body(call: Call, service: Service) -> bytes:
    """The whole body, decompressed; never more than `max_body_bytes` of it, before and after.

    Raises RequestTooLarge, BodyStalled, UnsupportedMedia, MalformedRequest, ClientLeft, or a Refusal
    where a big body would find no room.
    """
    limit = service.limits.max_body_bytes  # read anew: user_config changes it in place
    headers = call.headers
    encoding = headers.get(b"content-encoding")
    size = _declared_size(headers.get(b"content-length"))
    if size is not None and size > limit:
        raise _too_large(limit)
    if size is None or size > ASK_FROM_BYTES or encoding is not None:
        service.check_room(1)
        IN_HAND.check(size or 0)
    body = await _read_all(call, limit)
    if encoding is None:
        return body
    return await _decompressed(body, encoding, limit, call)


def _declared_size(length: bytes | None) -> int | None:
    if length is None:
        return None
    if not is_size(length):
        raise MalformedRequest("Content-Length must be a number of bytes", param="Content-Length")
    return int(length)


async def _read_all(call: Call, limit: int) -> bytes:
    """The body as it arrives; only what has arrived is counted as held, so that nobody can reserve."""
    chunks: list[bytes] = []
    size = 0
    is_open = True
    while is_open:
        with TimeLimit(STALL_TIMEOUT_S, BodyStalled, "the request's body stopped"):
            message = await call.receive()
        if message["type"] != "http.request":
            raise ClientLeft("the client left while it sent its body")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        IN_HAND.take(len(chunk), call)
        chunks.append(chunk)
        is_open = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _decompressed(body: bytes, encoding: bytes, limit: int, call: Call) -> bytes:
    name = encoding.strip().lower().decode("latin-1")
    if name in ("identity", ""):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMedia(f"content-encoding {name[:40]!r} is not read; use gzip or deflate")
    IN_HAND.take(min(limit, _DEFLATE_BEST * len(body)), call)
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
