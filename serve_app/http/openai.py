"""OpenAI's embeddings API, for applications whose model turns one item into one vector, and its models.

Owns: POST /v1/embeddings; GET /v1/models of every application with OpenAI's routes. Must not know: how a
text is embedded. Source: OpenAI's API reference, "Create embeddings" and "Models"; the `openai` client
asks for base64 unless told otherwise.
"""

import base64
from typing import Any

import msgspec
import numpy as np

from deployments.core.contract import Answer, Service
from deployments.core.errors import MalformedRequest, ModelBroken, NoSuchRoute
from serve_app.http.body import read_body
from serve_app.http.exchange import Call, Handler, Reply, encode_json, json_reply
from serve_app.http.jsonio import GC_OFF_FROM_BYTES, Item, Shape, decode, decode_counted, too_many_items
from serve_app.http.media import JSON_MEDIA, parse_content_type, unsupported
from serve_app.http.native import server_timing, warning_list
from serve_app.http.oip_messages import raise_first_error
from serve_app.http.options import request_options


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`user` is taken and not used: OpenAI uses it to find abuse."""

    input: Any
    model: str
    encoding_format: str = "float"
    dimensions: int | None = None
    user: str | None = None


class BigEmbeddingRequest(EmbeddingRequest, forbid_unknown_fields=True):
    input: list[Item] | str


_REQUEST = msgspec.json.Decoder(EmbeddingRequest)
_REQUEST_SHAPE = Shape(EmbeddingRequest)


def _read_request(body: bytes, max_items: int) -> EmbeddingRequest:
    if len(body) < GC_OFF_FROM_BYTES:
        return decode(_REQUEST, _REQUEST_SHAPE, body)
    return decode_counted(BigEmbeddingRequest, _REQUEST_SHAPE, body, limit=max_items, param="input")


class Models:
    """The one model of a service, as OpenAI lists models."""

    def __init__(self, service: Service) -> None:
        self._name = service.card.name
        self._json = {"id": self._name, "object": "model", "created": 0, "owned_by": "brimful"}

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {"/v1/models": {"GET": self.models}, "/v1/models/{id}": {"GET": self.model}}

    async def models(self, call: Call) -> Reply:
        return json_reply({"object": "list", "data": [self._json]})

    async def model(self, call: Call) -> Reply:
        self.check(call.path_param("id"))
        return json_reply(self._json)

    def check(self, name: str) -> None:
        """Raise NoSuchRoute unless `name` is the application's."""
        if name != self._name:
            raise NoSuchRoute(
                f"there is no model {name[:80]!r} here; this application serves '{self._name}'",
                param="model",
            )


class Embeddings:
    """The handler of a service whose card says `embeds`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._name = service.card.name
        self._models = Models(service)
        self._output = service.card.outputs[0].name
        self._dimensions = service.card.outputs[0].shape[-1]

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {"/v1/embeddings": {"POST": self.embeddings}}

    async def embeddings(self, call: Call) -> Reply:
        media = parse_content_type(call.headers.get(b"content-type")).media
        if media != JSON_MEDIA:
            raise unsupported(media, (JSON_MEDIA,))
        body = await read_body(call, self._service)
        request = _read_request(body, self._service.limits.max_items_per_request)
        self._models.check(request.model)
        self._check_formats(request)
        options = request_options(call, timeout_ms=None, priority=0, body_bytes=len(body), as_tensors=True)
        answer = await self._service.predict(self._texts(request.input), options)
        raise_first_error(answer)
        return self._reply(answer, as_base64=request.encoding_format == "base64")

    def _check_formats(self, request: EmbeddingRequest) -> None:
        if request.encoding_format not in ("float", "base64"):
            raise MalformedRequest("`encoding_format` must be float or base64", param="encoding_format")
        if request.dimensions not in (None, self._dimensions):
            raise MalformedRequest(
                f"`dimensions` must be {self._dimensions}: this model's vectors can't be shortened",
                param="dimensions",
            )

    def _texts(self, value: object) -> list[str]:
        """One string or a list of strings. Tokens are refused: ours are not OpenAI's."""
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            raise MalformedRequest("`input` must be a string or a list of strings", param="input")
        if not all(isinstance(text, str) for text in value):
            raise MalformedRequest(
                "`input` must hold strings: tokens of another model's tokenizer mean nothing here",
                param="input",
            )
        limit = self._service.limits.max_items_per_request
        if len(value) > limit:
            raise too_many_items(len(value), limit, param="input")
        return value

    def _reply(self, answer: Answer, *, as_base64: bool) -> Reply:
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": self._vector(outcome.value, as_base64=as_base64),
            }
            for index, outcome in enumerate(answer.outcomes)
        ]
        tokens = int(sum(outcome.cost for outcome in answer.outcomes))
        body: dict[str, Any] = {
            "object": "list",
            "data": data,
            "model": self._name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        warnings = warning_list(answer.outcomes)
        if warnings:
            body["warnings"] = warnings
        return Reply(encode_json(body), headers=[server_timing(answer)])

    def _vector(self, value: Any, *, as_base64: bool) -> str | list[float]:
        try:
            vector = np.asarray(value[self._output], dtype="<f4")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelBroken("the model's output is no vector of floats") from error
        if as_base64:
            return base64.b64encode(vector.tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
