"""In front of Ray's own handling of a request in a replica: what streams need of the server beneath.

Owns: the middleware that Ray finds by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
(`serve_app.http.front:middlewares`), and uvicorn's WebSocket settings, which Ray has no words for. Must
not know: routes of other kinds, what a stream carries.

Without it Ray reads a request into an unbounded queue while the application works (2.60:
direct_ingress_http_util.py, ASGIDIReceiveProxy), so a client faster than the model fills the memory.
"""

import asyncio
import functools
from typing import cast

import uvicorn
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from serve_app.http.gathered import GatheredWrites

_ROUTES = ("/stream", "/ws")
_OWN_WATCH = (b"x-request-disconnect-disabled", b"?1")
"""Ray's header for "I see disconnects myself": `receive` is then the server's own, with its back-pressure."""


def middlewares() -> list[Middleware]:
    """What Ray puts in front of its own; called in each replica just before its server is made."""
    _set_websockets()
    return [Middleware(OwnWatch)]


class OwnWatch:
    """Tells Ray that streams notice by themselves when their client leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"].endswith(_ROUTES):
            scope["headers"] = [*scope["headers"], _OWN_WATCH]
        await self._app(scope, receive, send)


def _set_websockets() -> None:
    """No compression (a 10 kB message costs 81 us to receive with it, 18 without; a result 23 to send, not
    14), and no pings: a pong lies behind the data that back-pressure leaves unread, and without it
    uvicorn ends the stream after 20 s. Time-outs of streams are in duplex.py."""
    made = functools.partialmethod(
        uvicorn.Config.__init__, ws=GatheringProtocol, ws_per_message_deflate=False, ws_ping_interval=None
    )
    uvicorn.Config.__init__ = made  # type: ignore[method-assign,assignment]


class GatheringProtocol(WebSocketsSansIOProtocol):
    """uvicorn's own, that sends the messages of one turn of the event loop in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, GatheredWrites(transport, self.loop)))
