"""/ws: the same streams over a WebSocket, one JSON a message out.

Owns: WebSocket's side of a stream: which messages are data, which end the input, close codes. Must not
know: HTTP bodies, what the bytes mean.

Close codes per RFC 6455, 7.4.1 and the IANA registry: 1000 done, 1008 the caller's fault, 1011 ours, 1013
try again later. A browser shows its page no status of a refused handshake, so what is refused is
accepted first and then told. The server beneath closes by itself with 1009 over its own message limit
(uvicorn: 16 MiB); its pings are off (front.py), and silence is timed in duplex.py.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from deployments.core.contract import Limits, StreamingService, Streams
from deployments.core.errors import (
    CallerError,
    ClientLeft,
    InternalError,
    MalformedRequest,
    Overloaded,
    Refusal,
    RequestTooLarge,
    ServingError,
    StreamTimeout,
)
from serve_app.http.body import IN_HAND
from serve_app.http.duplex import Duplex, encoded
from serve_app.http.errors import native_body, status_of
from serve_app.http.exchange import Call, Reply, encode_json, log_failure, request_id_of
from serve_app.http.sending import send_within
from serve_app.http.streams import open_stream, read_request

logger = logging.getLogger(__name__)

ROUTE = "/ws"
DONE, CALLERS, OURS, LATER, TOO_BIG = 1000, 1008, 1011, 1013, 1009


class _End(msgspec.Struct, forbid_unknown_fields=True):
    end: bool


_END = msgspec.json.Decoder(_End)


def close_code_of(error: ServingError) -> int:
    """What the last message said, for clients that look only at the code."""
    if isinstance(error, Refusal):
        return LATER
    return CALLERS if isinstance(error, CallerError) else OURS


class WebSocketStream:
    """ASGI application of /ws."""

    def __init__(self, service: StreamingService, *, adds_request_id: bool = False) -> None:
        self._service = service
        self._adds_request_id = adds_request_id
        self._without_request = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        call = Call(scope, receive, send, headers, request_id_of(headers), self._adds_request_id)
        wire = _WebSocketWire(call, self._service.limits)
        try:
            error = await self._outcome(call, wire)
            await wire.end(error)
        except ClientLeft:
            return  # the server closes the connection

    async def _outcome(self, call: Call, wire: "_WebSocketWire") -> ServingError | None:
        """Serve the stream, count it once, and return what to tell the client, if anything."""
        error: ServingError | None = None
        try:
            await self._serve(call, wire)
        except (asyncio.CancelledError, ClientLeft):
            self._service.count_outcome(499, route=ROUTE)
            logger.info("event=client_left route=%s request_id=%s", ROUTE, call.request_id)
            raise
        except ServingError as refused:
            error = refused
        except Exception as bug:
            error = InternalError.of("something went wrong on our side; the log knows the request id", bug)
        finally:
            if call.at_end is not None:
                call.at_end(call)
        status = 200 if error is None else status_of(error)
        if error is not None and status == 500:
            log_failure(error, route=ROUTE, request_id=call.request_id)
        self._service.count_outcome(status, route=ROUTE)
        return error

    async def _serve(self, call: Call, wire: "_WebSocketWire") -> None:
        await wire.open()
        if self._service.card.streams is Streams.CHUNKS:
            stream = open_stream(self._service, call, None)
            await Duplex(stream, wire, call, self._service.limits).run(has_input=True)
            return
        request = await self._first_request(wire)
        stream = open_stream(self._service, call, read_request(request), len(request))
        await Duplex(stream, wire, call, self._service.limits).run(has_input=False)

    async def _first_request(self, wire: "_WebSocketWire") -> bytes:
        """Sockets that have not asked yet are no streams of the engine's, and bounded as those are."""
        most = self._service.limits.max_streams
        if self._without_request >= most:
            raise Overloaded(f"{most} sockets have not sent their request yet (max_streams)", retry_after_s=1)
        self._without_request += 1
        try:
            return await wire.receive_request()
        finally:
            self._without_request -= 1


async def refuse_plain_http(call: Call) -> Reply:
    """The answer to GET /ws without an upgrade."""
    raise MalformedRequest("this route is a WebSocket; connect with ws:// or wss://")


class _WebSocketWire:
    """One connection: binary messages in, text messages out."""

    def __init__(self, call: Call, limits: Limits) -> None:
        self._call = call
        self._limits = limits
        self._is_open = False

    async def open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        if (await self._call.receive())["type"] != "websocket.connect":
            raise ClientLeft("the client left during the handshake")
        given = [(b"x-request-id", self._call.request_id.encode())] if self._call.adds_request_id else []
        await self._send_last({"type": "websocket.accept", "headers": given})

    async def receive(self) -> tuple[bytes, bool]:
        message = await self._message()
        data: bytes | None = message.get("bytes")
        if data is not None:
            return data, False
        if not _is_end(message["text"]):
            raise MalformedRequest('a text message must be {"end": true}; data is sent as binary messages')
        return b"", True

    async def receive_request(self) -> bytes:
        """The first message, where streams take one request."""
        try:
            message = await asyncio.wait_for(self._message(), self._limits.idle_timeout_s)
        except asyncio.TimeoutError:
            raise StreamTimeout(
                f"no request came for {self._limits.idle_timeout_s:g} s (idle_timeout_s)"
            ) from None
        text: str | None = message.get("text")
        if text is None:
            raise MalformedRequest("the first message must be the request: JSON as a text message")
        request = text.encode()
        IN_HAND.take(len(request), self._call)
        return request

    async def _message(self) -> Message:
        message = await self._call.receive()
        if message["type"] != "websocket.receive":
            if message.get("code") == TOO_BIG:  # the server has told the client already
                raise self._too_large()
            raise ClientLeft("the client left the stream")
        if len(message.get("bytes") or message.get("text") or b"") > self._limits.max_body_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"a message is over {self._limits.max_body_bytes} bytes (max_body_bytes); send smaller ones"
        )

    async def send(self, outputs: Sequence[Any]) -> None:
        try:
            for output in outputs:
                await self._call.send({"type": "websocket.send", "text": encoded(output).decode()})
        except (OSError, RuntimeError):  # uvicorn's ClientDisconnected; RuntimeError: it closed by itself
            raise ClientLeft("the client left the stream") from None

    async def end(self, error: ServingError | None) -> None:
        """The error as a last message, and the close code. Raises ClientLeft where nobody takes it."""
        if error is None:
            await self._send_last({"type": "websocket.close", "code": DONE})
            return
        text = encode_json(native_body(error, self._call.request_id)).decode()
        await self._send_last({"type": "websocket.send", "text": text})
        close = {"type": "websocket.close", "code": close_code_of(error), "reason": error.type}
        await self._send_last(close)

    async def _send_last(self, message: Message) -> None:
        try:
            await send_within(self._call.send, message, self._limits.idle_timeout_s)
        except (OSError, RuntimeError):
            raise ClientLeft("the client left the stream") from None


def _is_end(text: str) -> bool:
    try:
        return _END.decode(text).end
    except (ValueError, RecursionError):
        return False
