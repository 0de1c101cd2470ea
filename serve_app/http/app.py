"""The ASGI application of one replica: which path goes where.

Owns: the table of routes below an application's prefix (`scope["root_path"]`), 404 and 405. Must not
know: Ray, the model behind the Service.
"""

from collections.abc import Mapping
from typing import cast

from starlette.routing import BaseRoute, Route, Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.core.contract import Service, StreamingService, Streams, TextService
from deployments.core.errors import NoSuchRoute
from serve_app.http.chat import Chat
from serve_app.http.errors import Dialect, dialect_of
from serve_app.http.exchange import Call, Endpoint, Handler, Reply, json_reply
from serve_app.http.native import Native
from serve_app.http.oip import OpenInference
from serve_app.http.openai import Embeddings, Models
from serve_app.http.openapi import Description
from serve_app.http.streams import ByteStreams
from serve_app.http.websockets import ROUTE as WS_ROUTE
from serve_app.http.websockets import WebSocketStream, refuse_plain_http

Table = Mapping[str, Mapping[str, Handler]]
"""Path below the prefix, as Starlette spells it, to method to handler."""


def make_app(service: Service, *, adds_request_id: bool = False) -> ASGIApp:
    """The ASGI application that serves `service`; call it once the service knows its card.

    adds_request_id: answer with X-Request-Id. Off where a middleware in front does it already
    (Ray Serve's does), since the header must be there exactly once.
    """
    native = Native(service)
    table: dict[str, Mapping[str, Handler]] = {
        "/predict": {"POST": native.predict},  # first: routes are tried in order
        "/healthz": {"GET": _alive},
        "/stats": {"GET": _stats_of(service)},
        **Description(service).routes(),
        **OpenInference(service).routes(),
        **_openai_routes(service),
        **_stream_routes(service),
    }
    routes: list[BaseRoute] = [
        Route(
            path,
            Endpoint(
                service,
                path,
                handlers,
                dialect=dialect_of(path),
                adds_request_id=adds_request_id,
            ),
        )
        for path, handlers in table.items()
    ]
    if WS_ROUTE in table:
        socket = WebSocketStream(cast(StreamingService, service), adds_request_id=adds_request_id)
        routes.append(WebSocketRoute(WS_ROUTE, socket))
    unknown = _Unknown(service, table, adds_request_id=adds_request_id)
    return Router(routes, default=unknown, redirect_slashes=False)


def _openai_routes(service: Service) -> Table:
    card = service.card
    if not (card.embeds or card.generates):
        return {}
    routes = Models(service).routes()
    if card.embeds:
        routes |= Embeddings(service).routes()
    if card.generates:
        routes |= Chat(cast(TextService, service)).routes()  # what `generates` promises
    return routes


def _stream_routes(service: Service) -> Table:
    if service.card.streams is Streams.NONE:
        return {}
    streams = ByteStreams(cast(StreamingService, service)).routes()  # what `streams` promises
    return streams | {WS_ROUTE: {"GET": refuse_plain_http}}


async def _alive(call: Call) -> Reply:
    return json_reply({"status": "alive"})


def _stats_of(service: Service) -> Handler:
    async def stats(call: Call) -> Reply:
        return json_reply(service.stats())

    return stats


class _Unknown:
    """Every path without a route: the index at the prefix itself, else 404 with the routes there are."""

    def __init__(self, service: Service, table: Table, *, adds_request_id: bool) -> None:
        self._routes = {path: sorted(handlers) for path, handlers in table.items()}
        self._index = {"name": service.card.name, "routes": self._routes}
        self._endpoints = {
            dialect: Endpoint(
                service,
                "unknown",
                dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"), self._refuse),
                dialect=dialect,
                adds_request_id=adds_request_id,
            )
            for dialect in Dialect
        }
        self._root = Endpoint(service, "/", {"GET": self._answer_index}, adds_request_id=adds_request_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
            return
        path = _below_prefix(scope)
        endpoint = self._root if path in ("", "/") else self._endpoints[dialect_of(path)]
        await endpoint(scope, receive, send)

    async def _answer_index(self, call: Call) -> Reply:
        return json_reply(self._index)

    async def _refuse(self, call: Call) -> Reply:
        routes = ", ".join(self._routes)
        raise NoSuchRoute(f"there is no such route here; there are {routes}")


def _below_prefix(scope: Scope) -> str:
    """The path without the application's prefix, as Starlette's router sees it."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    is_below = path == prefix or path.startswith(f"{prefix}/")
    return path[len(prefix) :] if prefix and is_below else path
