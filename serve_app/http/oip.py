"""Open Inference Protocol v2 (KServe, Triton): metadata, health, and infer with JSON or binary data.

Owns: the routes. Must not know: how an item is run, how tensors are written. Sources:
KServe's "Open Inference Protocol" and Triton's "Binary tensor data extension".

Dimension 0 of every input counts the items; a list with one bad item fails whole (docs/reference/http.md).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deployments.core.contract import Answer, RequestOptions, Service, TensorSpec
from deployments.core.errors import NoSuchRoute
from serve_app.http.body import read_body
from serve_app.http.exchange import Call, Handler, Reply, json_reply
from serve_app.http.media import JSON_MEDIA, parse_content_type, unsupported
from serve_app.http.native import warning_list
from serve_app.http.oip_messages import (
    BINARY_MEDIA,
    HEADER_LENGTH,
    MODEL_VERSION,
    InferRequest,
    divided,
    infer_reply,
    raise_first_error,
    read_items,
    read_request,
    response_outputs,
    wanted_outputs,
)
from serve_app.http.options import checked_priority, checked_timeout, request_options


class OpenInference:
    """The handlers under /v2 for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._name = service.card.name
        self._card = service.card
        self._outputs = {spec.name: spec for spec in service.card.outputs}

    def routes(self) -> dict[str, dict[str, Handler]]:
        """Path to method to handler; version 1 is the only one."""
        table: dict[str, dict[str, Handler]] = {
            "/v2": {"GET": self.server},
            "/v2/health/live": {"GET": self.live},
            "/v2/health/ready": {"GET": self.ready},
        }
        for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            table[base] = {"GET": self.model}
            table[f"{base}/ready"] = {"GET": self.model_ready}
            table[f"{base}/infer"] = {"POST": self.infer}
        return table

    async def server(self, call: Call) -> Reply:
        return json_reply(
            {"name": "brimful", "version": _own_version(), "extensions": ["binary_tensor_data"]}
        )

    async def live(self, call: Call) -> Reply:
        return json_reply({"live": True})

    async def ready(self, call: Call) -> Reply:
        return self._readiness({})

    async def model(self, call: Call) -> Reply:
        self._check_model(call)
        return json_reply(
            {
                "name": self._name,
                "versions": [MODEL_VERSION],
                "platform": "pytorch",
                "inputs": [_spec_json(spec) for spec in self._card.inputs],
                "outputs": [_spec_json(spec) for spec in self._card.outputs],
            }
        )

    async def model_ready(self, call: Call) -> Reply:
        self._check_model(call)
        return self._readiness({"name": self._name})

    async def infer(self, call: Call) -> Reply:
        self._check_model(call)
        media = parse_content_type(call.headers.get(b"content-type")).media
        if media not in (JSON_MEDIA, BINARY_MEDIA):
            raise unsupported(media, (JSON_MEDIA, BINARY_MEDIA))
        body = await read_body(call, self._service)
        head, tail = divided(body, call.headers.get(HEADER_LENGTH))
        request = read_request(head)
        wanted = wanted_outputs(request, self._outputs)
        items = read_items(request, tail, self._card, self._service.limits.max_items_per_request)
        answer = await self._service.predict(items, _options(call, request, len(body)))
        raise_first_error(answer)
        outputs = response_outputs(answer, list(wanted), self._card)
        return infer_reply(self._response_head(request, answer), outputs, wanted, answer)

    def _response_head(self, request: InferRequest, answer: Answer) -> dict[str, Any]:
        head: dict[str, Any] = {"model_name": self._name, "model_version": MODEL_VERSION}
        if request.id:
            head["id"] = request.id
        warnings = warning_list(answer.outcomes)
        if warnings:  # parameters hold plain values only, so the list is one text
            texts = [f"item {w['index']}: {w['message']}" for w in warnings]
            head["parameters"] = {"warnings": "; ".join(texts)}
        return head

    def _readiness(self, body: dict[str, Any]) -> Reply:
        if self._service.is_ready():
            return json_reply(body | {"ready": True})
        reply = json_reply(body | {"ready": False}, 503)
        reply.headers.append((b"retry-after", b"1"))
        return reply

    def _check_model(self, call: Call) -> None:
        name = call.path_param("name")
        if name != self._name:
            raise NoSuchRoute(
                f"there is no model {name[:80]!r} here; this application serves '{self._name}'",
                param="model",
            )
        if call.scope["path_params"].get("version", MODEL_VERSION) != MODEL_VERSION:
            raise NoSuchRoute(f"model '{name}' has one version, {MODEL_VERSION}", param="version")


def _own_version() -> str:
    try:
        return version("brimful")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _options(call: Call, request: InferRequest, body_bytes: int) -> RequestOptions:
    timeout_us = request.parameters.timeout
    timeout_ms = None
    if timeout_us:
        timeout_ms = checked_timeout(timeout_us, "parameters.timeout", "microseconds") / 1000
    return request_options(
        call,
        timeout_ms=timeout_ms,
        priority=checked_priority(request.parameters.priority, "parameters.priority"),
        body_bytes=body_bytes,
        as_tensors=True,
    )
