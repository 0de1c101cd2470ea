"""GET /openapi.json and /docs: what this application offers, true enough to fuzz it with.

Owns: the paths, and the statuses each may answer. Must not know: how anything is served. OpenAPI 3.1;
docs.html beside this file draws it without loading anything from elsewhere.
"""

from pathlib import Path
from typing import Any

from deployments.core.contract import Limits, ModelCard, Service, Streams
from serve_app.http import chat_schemas, schemas
from serve_app.http.exchange import Call, Handler, Reply, json_reply
from serve_app.http.oip_messages import BINARY_MEDIA
from serve_app.http.schemas import OPEN, STRING, Schema, array, record

WHY = {
    "400": "not JSON, or the wrong shape of request",
    "404": "no such model",
    "408": "the body stalled, or the stream was idle or open for too long",
    "413": "over max_body_bytes or max_items_per_request",
    "415": "a content type or encoding that is not read",
    "422": "well formed, but the model can't take an item",
    "500": "our bug, or the model raised; the log knows the request id",
    "503": "no room within the allowed wait, or stopping; see Retry-After",
    "504": "the deadline passed before the model began",
}
ON_WORK = ("400", "408", "413", "415", "422", "500", "503", "504")
ON_READ = ("500",)


class Description:
    """The handlers of /openapi.json and /docs; the description is made anew when limits change."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = service.limits
        self._document = describe(service.card, self._limits)
        self._page = Path(__file__).with_name("docs.html").read_bytes()

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {"/openapi.json": {"GET": self.openapi}, "/docs": {"GET": self.docs}}

    async def openapi(self, call: Call) -> Reply:
        if self._service.limits != self._limits:
            self._limits = self._service.limits
            self._document = describe(self._service.card, self._limits)
        prefix = call.scope.get("root_path", "") or "/"
        return json_reply(self._document | {"servers": [{"url": prefix}]})

    async def docs(self, call: Call) -> Reply:
        # The page holds its own script and style and may talk to nobody but this server.
        policy = (
            b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        )
        return Reply(
            self._page,
            content_type=b"text/html; charset=utf-8",
            headers=[(b"content-security-policy", policy)],
        )


def describe(card: ModelCard, limits: Limits) -> dict[str, Any]:
    """The OpenAPI document, without `servers`: the prefix is known only when a request comes."""
    paths = _own_paths(card, limits) | _oip_paths(card, limits)
    if card.embeds or card.generates:
        paths |= _openai_paths(card, limits)
    if card.streams is not Streams.NONE:
        paths |= _stream_paths(card)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": card.name,
            "version": "1",
            "description": "Every answer carries X-Request-Id. Other methods than these get 405.",
        },
        "paths": paths,
    }


def _content(schema: Schema, *media: str) -> dict[str, Any]:
    return {name: {"schema": schema} for name in media or ("application/json",)}


def _operation(
    summary: str, answer: Schema, failure: Schema, statuses: tuple[str, ...], **more: Any
) -> dict[str, Any]:
    """One operation: 200 with `answer` as JSON, each of `statuses` with `failure`."""
    responses = {"200": {"description": "done", "content": _content(answer)}}
    for status in statuses:
        responses[status] = {"description": WHY[status], "content": _content(failure)}
    return {"summary": summary, "responses": responses} | more


def _get(summary: str, answer: Schema, *, failure: Schema, also: tuple[str, ...] = ()) -> Schema:
    return {"get": _operation(summary, answer, failure, (*also, *ON_READ))}


_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "Not begun by then: 504. Of header and body the shorter holds.",
}


def _own_paths(card: ModelCard, limits: Limits) -> dict[str, Any]:
    failure = record({"error": schemas.NATIVE_ERROR})
    index = record({"name": STRING, "routes": OPEN})
    page = {"description": "the page", "content": {"text/html": {"schema": STRING}}}
    docs = _get("A page that shows this description.", STRING, failure=failure)
    docs["get"]["responses"]["200"] = page
    return {
        "/predict": {"post": _predict(card, limits)},
        "/": _get("The routes there are.", index, failure=failure),
        "/healthz": _get("Alive.", record({"status": {"const": "alive"}}), failure=failure),
        "/stats": _get("This replica's figures.", OPEN, failure=failure),
        "/openapi.json": _get("This description.", OPEN, failure=failure),
        "/docs": docs,
    }


def _predict(card: ModelCard, limits: Limits) -> dict[str, Any]:
    content = _content(schemas.predict_request(card, limits))
    if card.media_types:
        content |= _content({"type": "string", "format": "binary"}, *card.media_types)
        content |= _content(schemas.form_request(limits), "multipart/form-data")
    return _operation(
        "Run the model on a list of items; outputs come in the same order.",
        schemas.predict_answer(card),
        schemas.predict_failure(),
        ON_WORK,
        requestBody={"required": True, "content": content},
        parameters=[_TIMEOUT],
    )


def _stream_paths(card: ModelCard) -> dict[str, Any]:
    """/ws has no description in OpenAPI but this: what plain HTTP gets there."""
    failure = record({"error": schemas.NATIVE_ERROR})
    content = _content({"type": "string", "format": "binary"}, "application/octet-stream")
    if card.streams is Streams.REQUEST:
        content = _content(dict(card.item_schema))
    stream = _operation(
        "Outputs as lines of JSON, each as soon as it is ready, while input still comes.",
        OPEN,
        failure,
        ON_WORK,
        requestBody={"required": True, "content": content},
        parameters=[_TIMEOUT],
    )
    lines = {"type": "string", "description": "A line an output; an error on the way is a last line."}
    stream["responses"]["200"]["content"] = _content(lines, "application/x-ndjson")
    socket = _get("The same as a WebSocket.", OPEN, failure=failure, also=("400",))
    socket["get"]["responses"]["101"] = {"description": "a WebSocket from here on"}
    del socket["get"]["responses"]["200"]
    return {"/stream": {"post": stream}, "/ws": socket}


def _oip_paths(card: ModelCard, limits: Limits) -> dict[str, Any]:
    failure = record({"error": STRING})
    unready = {"type": "object"}
    metadata = record(
        {
            "name": STRING,
            "versions": array(STRING),
            "platform": STRING,
            "inputs": array(schemas.tensor_spec()),
            "outputs": array(schemas.tensor_spec()),
        }
    )
    server = record({"name": STRING, "version": STRING, "extensions": array(STRING)})
    live = record({"live": {"const": True}})
    paths: dict[str, Any] = {
        "/v2": _get("Server metadata (Open Inference Protocol).", server, failure=failure),
        "/v2/health/live": _get("Alive.", live, failure=failure),
        "/v2/health/ready": _get("Ready for work.", OPEN, failure=unready, also=("503",)),
    }
    version = _path_parameter("version", "1")
    for base, more in (("", []), ("/versions/{version}", [version])):
        path = f"/v2/models/{{name}}{base}"
        on_path = {"parameters": [_path_parameter("name", card.name), *more]}
        paths[path] = _get("Inputs and outputs.", metadata, failure=failure, also=("404",))
        ready = _get("Ready for work.", OPEN, failure=unready, also=("404", "503"))
        paths[f"{path}/ready"] = ready
        paths[f"{path}/infer"] = {"post": _infer(card, limits, failure)}
        for end in ("", "/ready", "/infer"):
            paths[path + end] |= on_path
    return paths


def _infer(card: ModelCard, limits: Limits, failure: Schema) -> dict[str, Any]:
    operation = _operation(
        "Run the model on tensors; dimension 0 counts the items.",
        schemas.infer_answer(),
        failure,
        ("404", *ON_WORK),
        requestBody={
            "required": True,
            "content": _content(schemas.infer_request(card, limits)),
            "description": "JSON, or JSON and binary tensors behind it (application/octet-stream,"
            " with Inference-Header-Content-Length).",
        },
        parameters=[_TIMEOUT],
    )
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["responses"]["200"]["content"][BINARY_MEDIA] = binary
    return operation


def _openai_paths(card: ModelCard, limits: Limits) -> dict[str, Any]:
    failure = record({"error": schemas.OPENAI_ERROR})
    model = record(
        {
            "id": STRING,
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": STRING,
        }
    )
    models = record({"object": {"const": "list"}, "data": array(model)})
    one = _get("This model.", model, failure=failure, also=("404",))
    paths: dict[str, Any] = {
        "/v1/models": _get("The models, one.", models, failure=failure),
        "/v1/models/{id}": one | {"parameters": [_path_parameter("id", card.name)]},
    }
    if card.embeds:
        request, answer = schemas.embedding_request(card, limits), schemas.embedding_answer()
        paths["/v1/embeddings"] = {"post": _openai_work("Embed texts (OpenAI).", request, answer)}
    if card.generates:
        request, answer = chat_schemas.chat_request(card), chat_schemas.chat_answer()
        chat = _openai_work("Go on with a chat (OpenAI).", request, answer)
        request, answer = chat_schemas.completion_request(card, limits), chat_schemas.completion_answer()
        completion = _openai_work("Go on with a text (OpenAI).", request, answer)
        for operation in (chat, completion):
            events = {"schema": {"description": "With `stream`: an event a chunk, then [DONE]."}}
            operation["responses"]["200"]["content"]["text/event-stream"] = events
        paths |= {"/v1/chat/completions": {"post": chat}, "/v1/completions": {"post": completion}}
    return paths


def _openai_work(summary: str, request: Schema, answer: Schema) -> dict[str, Any]:
    return _operation(
        summary,
        answer,
        record({"error": schemas.OPENAI_ERROR}),
        ("404", *ON_WORK),
        requestBody={"required": True, "content": _content(request)},
        parameters=[_TIMEOUT],
    )


def _path_parameter(name: str, only: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"enum": [only]}}
