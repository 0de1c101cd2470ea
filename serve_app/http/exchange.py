"""One HTTP request and its answer: the frame around every route.

Owns: reading the head, request ids, the way from an exception to an answer, counting outcomes,
sending. Must not know: what a body means.

Plain ASGI on purpose: POST /predict with one small text takes 25 us from scope to last send on a 2-core
machine, routing and JSON included; Starlette's Request and middleware stack would double that.
"""

import asyncio
import logging
import re
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from deployments.core.contract import Service
from deployments.core.errors import ClientLeft, InternalError, MethodNotAllowed, ServingError
from serve_app.http.errors import BODY, Dialect, headers_of, status_of

logger = logging.getLogger(__name__)

JSON_TYPE = b"application/json"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
"""Any other id is replaced: it goes into every log line, where a space could forge a field. The same
stands in serve_app/haproxy_config.py."""
MAX_DETAIL_CHARS = 16_000
"""Of a traceback in the log: a model's error may quote its whole input."""

encode_json = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Call:
    """A request's head; the body is still to be read from `receive`.

    headers: lower-case names; of a repeated header the last. send, adds_request_id: for an answer in
    pieces, see head_of. held_bytes: of its body, counted by body.py, which has its `at_end` called
    when the request is over.
    """

    scope: Scope
    receive: Receive
    send: Send
    headers: Mapping[bytes, bytes]
    request_id: str
    adds_request_id: bool
    held_bytes: int = 0
    at_end: Callable[["Call"], None] | None = None

    def path_param(self, name: str) -> str:
        return str(self.scope["path_params"][name])


@dataclass(slots=True)
class Reply:
    """What goes back; `headers` holds what there is besides content-type and content-length.

    is_sent: the handler has sent it all, in pieces; `status` says how it ended, to be counted.
    """

    body: bytes
    status: int = 200
    content_type: bytes = JSON_TYPE
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_sent: bool = False


Handler = Callable[[Call], Awaitable[Reply]]


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(encode_json(value), status)


def error_reply(error: ServingError, dialect: Dialect, request_id: str) -> Reply:
    """The answer to a request that failed as a whole."""
    body = encode_json(BODY[dialect](error, request_id))
    return Reply(body, status_of(error), headers=headers_of(error))


def failure_reply(error: Exception, dialect: Dialect, *, route: str, request_id: str) -> Reply:
    """The answer to whatever a handler raised; a fault of ours is logged, and its caller told no details."""
    if not isinstance(error, ServingError):
        error = InternalError.of("something went wrong on our side; the log knows the request id", error)
    if status_of(error) == 500:
        log_failure(error, route=route, request_id=request_id)
    return error_reply(error, dialect, request_id)


def head_of(reply: Reply, call: Call, *lengths: tuple[bytes, bytes]) -> Message:
    """The message that starts an answer; lengths: its content-length, which one in pieces has not."""
    headers = [(b"content-type", reply.content_type), *lengths, *reply.headers]
    if call.adds_request_id:
        headers.append((b"x-request-id", call.request_id.encode()))
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The caller's X-Request-Id if it is fit for a log line, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex


def log_failure(error: ServingError, *, route: str, request_id: str) -> None:
    """A fault of ours goes to the log with its cause; the caller gets the request id only."""
    cause = error.__cause__
    detail = getattr(error, "detail", None) or ("" if cause is None else _traceback_of(cause))
    logger.error(
        "event=request_failed route=%s type=%s request_id=%s message=%r\n%s",
        route,
        error.type,
        request_id,
        error.message,
        _shortened(detail),
    )


def _shortened(detail: str) -> str:
    """At most MAX_DETAIL_CHARS of it, the middle left out: what was raised stands at the end."""
    if len(detail) <= MAX_DETAIL_CHARS:
        return detail
    head, tail = MAX_DETAIL_CHARS // 4, MAX_DETAIL_CHARS * 3 // 4 - 60
    left_out = len(detail) - head - tail
    return f"{detail[:head]}\n... {left_out} characters left out ...\n{detail[-tail:]}"


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


class Endpoint:
    """ASGI application of one route: any method in, exactly one answer out.

    route: the label under which outcomes are counted. Handlers raise ServingError for what they
    refuse; anything else they raise is our bug and answers 500 without details.
    """

    def __init__(
        self,
        service: Service,
        route: str,
        handlers: Mapping[str, Handler],
        *,
        dialect: Dialect = Dialect.NATIVE,
        adds_request_id: bool = False,
    ) -> None:
        self._count = service.count_outcome
        self._route = route
        self._handlers = dict(handlers)
        self._dialect = dialect
        self._adds_request_id = adds_request_id
        if "GET" in self._handlers:  # RFC 9110, 9.1: HEAD wherever there is GET
            self._handlers["HEAD"] = self._handlers["GET"]
        self._allow = tuple(sorted(self._handlers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        call = Call(scope, receive, send, headers, request_id_of(headers), self._adds_request_id)
        try:
            handler = self._handlers.get(scope["method"])
            if handler is None:
                raise self._method_not_allowed(scope["method"])
            reply = await handler(call)
        except (asyncio.CancelledError, ClientLeft) as left:
            self._count(499, route=self._route)
            logger.info("event=client_left route=%s request_id=%s", self._route, call.request_id)
            if isinstance(left, ClientLeft):
                return
            raise
        except Exception as error:
            reply = failure_reply(error, self._dialect, route=self._route, request_id=call.request_id)
        finally:
            if call.at_end is not None:
                call.at_end(call)
        self._count(reply.status, route=self._route)
        if not reply.is_sent:
            await _send(reply, call)

    def _method_not_allowed(self, method: str) -> MethodNotAllowed:
        allowed = ", ".join(self._allow)
        return MethodNotAllowed(
            f"{self._route} does not take {method[:20]}; use {allowed}", allow=self._allow
        )


async def _send(reply: Reply, call: Call) -> None:
    await call.send(head_of(reply, call, (b"content-length", b"%d" % len(reply.body))))
    body = b"" if call.scope["method"] == "HEAD" else reply.body
    await call.send({"type": "http.response.body", "body": body})
