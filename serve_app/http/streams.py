"""POST /stream: a body without end in, one JSON a line out, as each is ready.

Owns: HTTP's side of a stream: what may be sent, when the answer begins, the last line or the status of
an error, connections whose input nobody reads any more. Must not know: WebSockets, what the bytes mean.

Full duplex over one exchange, which RFC 9112, 9.3 allows and browsers do not: their fetch sends the
whole body first. Lines as in NDJSON (application/x-ndjson).
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import Message

from deployments.core.contract import OutputStream, StreamingService, Streams
from deployments.core.errors import ClientLeft, UnsupportedMedia
from serve_app.http.body import read_body
from serve_app.http.duplex import Duplex, encoded
from serve_app.http.errors import Dialect
from serve_app.http.exchange import Call, Handler, Reply, failure_reply, head_of
from serve_app.http.jsonio import Shape, decode
from serve_app.http.media import FORM_MEDIA, JSON_MEDIA, parse_content_type, unsupported
from serve_app.http.options import request_options
from serve_app.http.sending import send_within
from serve_app.http.sse import HEADERS

ROUTE = "/stream"
LINES_TYPE = b"application/x-ndjson"

LINGER_S = 1.0
"""How long input is read and thrown away behind the last line: a connection that is closed with unread input
is reset, and the reset overtakes the line on its way (RFC 9112, 9.6). Longer would let a client
that never looks go on sending."""


class _AnyRequest(msgspec.Struct):
    """No field is ours: the model says what a request is."""


_REQUEST = msgspec.json.Decoder(Any)
_REQUEST_SHAPE = Shape(_AnyRequest)


def read_request(body: bytes) -> Any:
    """The one JSON value of a stream that takes a request; raises MalformedRequest."""
    return decode(_REQUEST, _REQUEST_SHAPE, body)


def open_stream(service: StreamingService, call: Call, item: Any, body_bytes: int = 0) -> OutputStream:
    """A new stream with the options of the call's headers; raises what the service refuses."""
    return service.open_stream(
        item, request_options(call, timeout_ms=None, priority=0, body_bytes=body_bytes)
    )


class ByteStreams:
    """The handler of POST /stream for one service."""

    def __init__(self, service: StreamingService) -> None:
        self._service = service

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {ROUTE: {"POST": self.stream}}

    async def stream(self, call: Call) -> Reply:
        """The whole exchange, sent by the time it returns."""
        wire = _HttpWire(call, self._service.limits.idle_timeout_s)
        call.receive = wire.receive_message
        failure: Reply | None = None
        try:
            await self._serve(call, wire)
        except ClientLeft:
            raise
        except Exception as error:
            failure = failure_reply(error, Dialect.NATIVE, route=ROUTE, request_id=call.request_id)
        await wire.end(failure)
        return Reply(b"", 200 if failure is None else failure.status, is_sent=True)

    async def _serve(self, call: Call, wire: "_HttpWire") -> None:
        limits = self._service.limits
        if self._service.card.streams is Streams.CHUNKS:
            _check_bytes(call)
            stream = open_stream(self._service, call, None)
            await Duplex(stream, wire, call, limits).run(has_input=True)
            return
        _check_json(call)
        body = await read_body(call, self._service)
        stream = open_stream(self._service, call, read_request(body), len(body))
        await Duplex(stream, wire, call, limits).run(has_input=False)


def _check_bytes(call: Call) -> None:
    """Bytes of any type, but as they are."""
    encoding = call.headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity"):
        raise UnsupportedMedia("a stream is not decompressed; send it without Content-Encoding")
    if parse_content_type(call.headers.get(b"content-type")).media == FORM_MEDIA:
        raise UnsupportedMedia(
            "the body must be the bytes themselves, not a form (curl: --data-binary or -T)"
        )


def _check_json(call: Call) -> None:
    media = parse_content_type(call.headers.get(b"content-type")).media
    if media != JSON_MEDIA:
        raise unsupported(media, (JSON_MEDIA,))


class _HttpWire:
    """One exchange: the request's chunks in, lines out."""

    def __init__(self, call: Call, idle_timeout_s: float) -> None:
        self._call = call
        self._receive = call.receive
        self._idle_timeout_s = idle_timeout_s
        self._is_open = False
        self._has_input = True

    async def receive_message(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._has_input = False
        return message

    async def receive(self) -> tuple[bytes, bool]:
        message = await self.receive_message()
        if message["type"] != "http.request":
            raise ClientLeft("the client left the stream")
        return message.get("body", b""), not self._has_input

    async def open(self) -> None:
        if not self._is_open:
            await self._start(Reply(b"", content_type=LINES_TYPE, headers=list(HEADERS)))

    async def send(self, outputs: Sequence[Any]) -> None:
        lines = b"\n".join([encoded(output) for output in outputs]) + b"\n"
        await self.open()
        await self._call.send({"type": "http.response.body", "body": lines, "more_body": True})

    async def end(self, failure: Reply | None) -> None:
        """The last line, or an answer with its own status where none has begun; then the end.

        Raises ClientLeft where the client does not take it.
        """
        if failure is None:
            await self.open()
        elif self._is_open:
            await self._send_body(failure.body + b"\n", more=True)
        else:
            failure.headers.append((b"content-length", b"%d" % len(failure.body)))
            await self._start(failure)
            await self._send_body(failure.body, more=True)
        await self._linger()
        await self._send_body(b"", more=False)

    async def _start(self, reply: Reply) -> None:
        self._is_open = True
        head = head_of(reply, self._call)
        if self._has_input:  # else the server would read on, for a next request, what never ends
            head["headers"].append((b"connection", b"close"))
        await send_within(self._call.send, head, self._idle_timeout_s)

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await send_within(self._call.send, message, self._idle_timeout_s)

    async def _linger(self) -> None:
        """Throw away what still comes, until it ends or LINGER_S is over."""
        if self._has_input:
            rest = asyncio.ensure_future(self._discard())
            try:
                await asyncio.wait((rest,), timeout=LINGER_S)
            finally:
                rest.cancel()

    async def _discard(self) -> None:
        while self._has_input:
            await self.receive_message()
