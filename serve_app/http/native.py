"""POST /predict: our own protocol, a list of items in and a list of outputs out.

Owns: the request's shape, items out of JSON, raw media and forms, partial failure. Must not know: what
an item means to the model. Specified in docs/reference/http.md.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from deployments.core.contract import Answer, Outcome, RequestOptions, Service
from deployments.core.errors import MalformedRequest, ModelBroken, ServingError
from serve_app.http.body import read_body
from serve_app.http.errors import headers_of, native_body, status_of
from serve_app.http.exchange import JSON_TYPE, Call, Reply, encode_json, log_failure
from serve_app.http.jsonio import GC_OFF_FROM_BYTES, Item, Shape, decode, decode_counted, too_many_items
from serve_app.http.media import FORM_MEDIA, JSON_MEDIA, parse_content_type, read_form, unsupported
from serve_app.http.options import checked_priority, checked_timeout, request_options


class Parameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """timeout_ms: not begun by then, 504. priority: -10 to 10, lower first."""

    timeout_ms: float | None = None
    priority: float = 0


class PredictRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[Any]
    parameters: Parameters = Parameters()


class BigPredictRequest(PredictRequest, forbid_unknown_fields=True):
    inputs: list[Item]


_REQUEST = msgspec.json.Decoder(PredictRequest)
_REQUEST_SHAPE = Shape(PredictRequest, parameters=Parameters)
_PARAMETERS = msgspec.json.Decoder(Parameters)
_PARAMETERS_SHAPE = Shape(Parameters)


class Native:
    """The handler of POST /predict for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        media = service.card.media_types
        self._media_types = media
        self._accepted = (JSON_MEDIA, *media, FORM_MEDIA) if media else (JSON_MEDIA,)

    async def predict(self, call: Call) -> Reply:
        limits = self._service.limits  # read anew: user_config changes them in place
        body = await read_body(call, self._service)
        if call.headers.get(b"content-type") == JSON_TYPE:
            request = _read_json(body, limits.max_items_per_request)
        else:
            request = self._read_other(call, body)
        _check_count(request.inputs, limits.max_items_per_request)
        answer = await self._service.predict(request.inputs, _options(call, request.parameters, len(body)))
        return predict_reply(answer, call.request_id)

    def _read_other(self, call: Call, body: bytes) -> PredictRequest:
        content_type = parse_content_type(call.headers.get(b"content-type"))
        if content_type.media == JSON_MEDIA:
            return _read_json(body, self._service.limits.max_items_per_request)
        if content_type.media in self._media_types:
            if not body:
                raise MalformedRequest("the body is empty")
            return PredictRequest([body])
        if content_type.media == FORM_MEDIA and self._media_types:
            max_files = self._service.limits.max_items_per_request
            form = read_form(body, content_type, media_types=self._media_types, max_files=max_files)
            if form.parameters is None:
                return PredictRequest(list(form.files))
            parameters = decode(_PARAMETERS, _PARAMETERS_SHAPE, form.parameters)
            return PredictRequest(list(form.files), parameters)
        raise unsupported(content_type.media, self._accepted)


def _read_json(body: bytes, max_items: int) -> PredictRequest:
    if len(body) < GC_OFF_FROM_BYTES:
        return decode(_REQUEST, _REQUEST_SHAPE, body)
    return decode_counted(BigPredictRequest, _REQUEST_SHAPE, body, limit=max_items, param="inputs")


def _check_count(items: Sequence[Any], limit: int) -> None:
    if not items:
        raise MalformedRequest("`inputs` is empty; send at least one item", param="inputs")
    if len(items) > limit:
        raise too_many_items(len(items), limit, param="inputs")


def _options(call: Call, parameters: Parameters, body_bytes: int) -> RequestOptions:
    timeout_ms = parameters.timeout_ms
    if timeout_ms is not None:
        checked_timeout(timeout_ms, "parameters.timeout_ms")
    priority = parameters.priority
    return request_options(
        call,
        timeout_ms=timeout_ms,
        priority=checked_priority(priority, "parameters.priority") if priority else 0,
        body_bytes=body_bytes,
    )


def server_timing(answer: Answer) -> tuple[bytes, bytes]:
    """Where the time went, in ms, and the size of the batch (W3C Server Timing, 3)."""
    text = (
        f'queue;dur={answer.queue_ms:.1f}, batch;desc="{answer.batch_size}", model;dur={answer.model_ms:.1f}'
    )
    return (b"server-timing", text.encode())


def predict_reply(answer: Answer, request_id: str) -> Reply:
    """200 with all outputs, or the status of the first failed item and null in the failed places."""
    outcomes = answer.outcomes
    failed = _failed_places(outcomes)
    body = _answer_body(outcomes, failed, request_id)
    try:
        encoded = encode_json(body)
    except Exception:  # a value that is no JSON: find whose, the others get theirs
        _mark_unencodable(outcomes)
        failed = _failed_places(outcomes)
        encoded = encode_json(_answer_body(outcomes, failed, request_id))
    timing = server_timing(answer)
    if not failed:
        return Reply(encoded, headers=[timing])
    ours = [error for _, error in failed if status_of(error) == 500]
    if ours:  # the first stands for all: 256 tracebacks of one request help nobody
        log_failure(ours[0], route="/predict", request_id=request_id)
    first = failed[0][1]
    return Reply(encoded, status_of(first), headers=[timing, *headers_of(first)])


def _failed_places(outcomes: Sequence[Outcome]) -> list[tuple[int, ServingError]]:
    return [(i, o.error) for i, o in enumerate(outcomes) if o.error is not None]


def warning_list(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What was done to items but should be known: index, type and message of each."""
    return [
        {"index": i, "type": o.warning[0], "message": o.warning[1]}
        for i, o in enumerate(outcomes)
        if o.warning is not None
    ]


def _answer_body(
    outcomes: Sequence[Outcome], failed: Sequence[tuple[int, ServingError]], request_id: str
) -> dict[str, Any]:
    body: dict[str, Any] = {"outputs": [None if o.error else o.value for o in outcomes]}
    warnings = warning_list(outcomes)
    if warnings:
        body["warnings"] = warnings
    if failed:
        body["errors"] = [{"index": i, "type": e.type, "message": e.message} for i, e in failed]
        # Clients that know only failed requests find the first one where they look for it.
        body |= native_body(failed[0][1], request_id)
        body["error"]["param"] = failed[0][1].param or f"inputs[{failed[0][0]}]"
    return body


def _mark_unencodable(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        try:
            encode_json(outcome.value)
        except Exception as error:
            outcome.error = ModelBroken.of("the model's output is no JSON value; see postprocess", error)
