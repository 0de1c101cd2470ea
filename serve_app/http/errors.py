"""Each error class of deployments/core/errors.py: its HTTP status and how it is written down.

Owns: the one table of statuses, and the three bodies (native, OpenAI's under /v1, the Open Inference
Protocol's under /v2). Must not know: routes, Ray, what a model is.

Bodies follow docs/reference/errors.md; OpenAI's follows "Error codes" of its API reference, OIP's the
`$inference_error_response` of the protocol (a string under "error").
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

from deployments.core import errors as core
from deployments.core.errors import ServingError

STATUS: dict[type[ServingError], int] = {
    core.ServingError: 500,
    core.CallerError: 400,
    core.MalformedRequest: 400,
    core.RequestTooLarge: 413,
    core.UnsupportedMedia: 415,
    core.NoSuchRoute: 404,
    core.MethodNotAllowed: 405,
    core.BodyStalled: 408,
    core.InvalidItem: 422,
    core.ContextLengthExceeded: 400,  # as OpenAI has it; its clients look for the code
    core.Refusal: 503,
    core.Overloaded: 503,
    core.Draining: 503,
    core.DeadlinePassed: 504,
    core.StreamTimeout: 408,
    core.ClientLeft: 499,  # log and metric only: nobody is there to read it
    core.InternalError: 500,
    core.ModelFailed: 500,
    core.ModelBroken: 500,
}


def status_of(error: ServingError) -> int:
    """The status of an error; a class without a row (a model's own subclass) takes its parent's."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return 500


def headers_of(error: ServingError) -> list[tuple[bytes, bytes]]:
    """Headers an error asks for: Retry-After on every 503 (at least 1 s), Allow on 405."""
    if isinstance(error, core.MethodNotAllowed):
        return [(b"allow", ", ".join(error.allow).encode())]
    if status_of(error) == 503:
        seconds = getattr(error, "retry_after_s", None) or 1
        return [(b"retry-after", b"%d" % max(1, seconds))]
    return []


def native_body(error: ServingError, request_id: str) -> dict[str, Any]:
    return {
        "error": {
            "type": error.type,
            "message": error.message,
            "param": error.param,
            "request_id": request_id,
        }
    }


def openai_body(error: ServingError, request_id: str) -> dict[str, Any]:
    """OpenAI's fields; `code` is our stable type, or theirs where their clients know one."""
    code = error.type
    if isinstance(error, core.NoSuchRoute) and error.param == "model":
        code = "model_not_found"
    kind = "server_error" if status_of(error) >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": code,
            "request_id": request_id,
        }
    }


def oip_body(error: ServingError, request_id: str) -> dict[str, Any]:
    """One string: clients show nothing else, so a fault of ours carries the id in its text."""
    if status_of(error) == 500:
        return {"error": f"{error.message} (request_id {request_id})"}
    return {"error": error.message}


class Dialect(Enum):
    """Who reads the error: decides the body's shape, never the status."""

    NATIVE = "native"
    OPENAI = "openai"
    OIP = "oip"


BODY: dict[Dialect, Callable[[ServingError, str], dict[str, Any]]] = {
    Dialect.NATIVE: native_body,
    Dialect.OPENAI: openai_body,
    Dialect.OIP: oip_body,
}


def dialect_of(route_path: str) -> Dialect:
    """The dialect of a path below the application's prefix."""
    if route_path == "/v1" or route_path.startswith("/v1/"):
        return Dialect.OPENAI
    if route_path == "/v2" or route_path.startswith("/v2/"):
        return Dialect.OIP
    return Dialect.NATIVE
