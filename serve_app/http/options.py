"""What a caller may ask for besides the items: deadline and priority, from headers and body alike.

Owns: ranges and units, and which wins. Must not know: which protocol asked.
"""

import math
import re

from deployments.core.contract import PRIORITY_RANGE, RequestOptions
from deployments.core.errors import MalformedRequest
from serve_app.http.exchange import Call

LONGEST_TIMEOUT_MS = 86_400_000.0
"""Timers take no more than a day; who asks for longer gets a day."""

_NUMBER = re.compile(rb"\d{1,400}(\.\d{1,400})?([eE][+-]?\d{1,4})?")  # JSON's, without a sign


def header_timeout_ms(call: Call) -> float | None:
    """X-Request-Timeout-Ms, checked, or None without it."""
    text = call.headers.get(b"x-request-timeout-ms")
    if text is None:
        return None
    if _NUMBER.fullmatch(text) is None or not 0 < float(text) < math.inf:
        raise MalformedRequest(
            "X-Request-Timeout-Ms must be a number of milliseconds over 0",
            param="X-Request-Timeout-Ms",
        )
    return float(text)


def checked_priority(value: float, param: str) -> int:
    """An integer (2.0 is one, as in JSON Schema) within PRIORITY_RANGE."""
    low, high = PRIORITY_RANGE
    if value != int(value) or not low <= value <= high:
        raise MalformedRequest(
            f"`{param}` must be an integer from {low} to {high}; lower numbers go first", param=param
        )
    return int(value)


def checked_timeout(value: float, param: str, unit: str = "milliseconds") -> float:
    if not (math.isfinite(value) and value > 0):
        raise MalformedRequest(f"`{param}` must be a number of {unit} over 0", param=param)
    return value


def request_options(
    call: Call,
    *,
    timeout_ms: float | None,
    priority: int,
    body_bytes: int,
    as_tensors: bool = False,
) -> RequestOptions:
    """Options of a request; of header and parameter the shorter timeout holds.

    timeout_ms and priority come from the body and are checked already.
    """
    by_header = header_timeout_ms(call)
    if by_header is not None:
        timeout_ms = by_header if timeout_ms is None else min(timeout_ms, by_header)
    if timeout_ms is not None:
        timeout_ms = min(timeout_ms, LONGEST_TIMEOUT_MS)
    return RequestOptions(
        request_id=call.request_id,
        timeout_ms=timeout_ms,
        priority=priority,
        body_bytes=body_bytes,
        as_tensors=as_tensors,
    )
