"""Server-sent events: an answer that is sent while it is made.

Owns: when its status line goes out, what becomes of a failure before and after that. Must not know: what
the events say. Source: WHATWG HTML, 9.2 "Server-sent events"; the error event is OpenAI's.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from deployments.core.errors import ClientLeft
from serve_app.http.errors import Dialect
from serve_app.http.exchange import Call, Reply, failure_reply, head_of
from serve_app.http.sending import send_within

EVENT_STREAM = b"text/event-stream; charset=utf-8"
HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""nginx keeps an answer back unless told otherwise."""


async def send_events(
    call: Call, events: AsyncGenerator[bytes, None], *, route: str, timeout_s: float
) -> Reply:
    """Send each of `events` (one event or several) as it comes; the reply says only what to count.

    The status line goes with the first. What `events` raises before that is raised here; afterwards it
    becomes a last event, `data: {"error": ...}`. Raises ClientLeft where the client takes nothing for
    `timeout_s`.
    """
    reply = Reply(b"", content_type=EVENT_STREAM, headers=HEADERS, is_sent=True)
    last = b""
    is_begun = False
    async with aclosing(events):
        try:
            async for some in events:
                if not is_begun:
                    await send_within(call.send, head_of(reply, call), timeout_s)
                    is_begun = True
                message = {"type": "http.response.body", "body": some, "more_body": True}
                await send_within(call.send, message, timeout_s)
        except ClientLeft:
            raise
        except Exception as error:
            if not is_begun:
                raise
            failed = failure_reply(error, Dialect.OPENAI, route=route, request_id=call.request_id)
            reply.status, last = failed.status, b"data: " + failed.body + b"\n\n"
    await send_within(call.send, {"type": "http.response.body", "body": last}, timeout_s)
    return reply
