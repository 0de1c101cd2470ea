"""Every way a request can fail, as one small tree; HTTP statuses live in serve_app/http/errors.py.

    ServingError
    ├── CallerError            the caller's fault: the message says what to change
    │   ├── MalformedRequest       not JSON, the wrong shape of request
    │   ├── RequestTooLarge        over a limit of the request as a whole
    │   ├── UnsupportedMedia       a content type or encoding that no reader takes
    │   ├── NoSuchRoute            no such path, model or version
    │   ├── MethodNotAllowed       the path exists, the method does not
    │   ├── BodyStalled            the upload stopped half-way
    │   └── InvalidItem            well formed, but the model can't take it
    │       └── ContextLengthExceeded  prompt and output don't fit the model's context
    ├── Refusal                our refusal: try later, or elsewhere
    │   ├── Overloaded             no room within the allowed wait
    │   ├── Draining               this server is stopping
    │   ├── DeadlinePassed         not begun by its deadline
    │   └── StreamTimeout          a stream was idle, or open, for longer than allowed
    ├── ClientLeft             nobody waits for the answer any more
    └── InternalError          our bug, or the model's; details go to the log, never to the caller
        ├── ModelFailed            the model raised on this item
        └── ModelBroken            the model breaks its contract (wrong output count, non-finite output)

Messages are safe to show: they hold no traceback, no path and no other caller's data.
"""

import sys
import traceback

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self


class ServingError(Exception):
    """Base of all; `type` is the stable name that callers may switch on.

    `param` names the part of the request at fault ("inputs[3]"), or None.
    """

    type = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class CallerError(ServingError):
    type = "invalid_request"


class MalformedRequest(CallerError):
    type = "malformed_request"


class RequestTooLarge(CallerError):
    type = "request_too_large"


class UnsupportedMedia(CallerError):
    type = "unsupported_media_type"


class NoSuchRoute(CallerError):
    type = "not_found"


class MethodNotAllowed(CallerError):
    type = "method_not_allowed"

    def __init__(self, message: str, *, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.allow = allow


class BodyStalled(CallerError):
    type = "body_stalled"


class InvalidItem(CallerError):
    type = "invalid_item"


class ContextLengthExceeded(InvalidItem):
    type = "context_length_exceeded"


class Refusal(ServingError):
    """`retry_after_s` is a measured estimate, at least 1, or None where it can't be known."""

    type = "refused"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class Overloaded(Refusal):
    type = "overloaded"


class Draining(Refusal):
    type = "shutting_down"


class DeadlinePassed(Refusal):
    type = "deadline_exceeded"


class StreamTimeout(Refusal):
    type = "stream_timeout"


class ClientLeft(ServingError):
    type = "client_left"


class InternalError(ServingError):
    """`detail` is for the log of the request, never for its caller: a traceback as text, so that no
    frame (and no tensor in it) lives as long as the error does."""

    type = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, detail: str | None = None) -> None:
        super().__init__(message, param=param)
        self.detail = detail

    @classmethod
    def of(cls, message: str, cause: BaseException) -> Self:
        """With the traceback of what was raised as its detail: its end, where it is over 16 kB.

        Log lines have room for about as much, and a message may hold a whole input.
        """
        detail = "".join(traceback.format_exception(cause))
        if len(detail) > 16_384:
            kept = 16_384 - 64  # room for the note
            detail = f"[{len(detail) - kept} characters left out] ...{detail[-kept:]}"
        return cls(message, detail=detail)


class ModelFailed(InternalError):
    type = "model_error"


class ModelBroken(InternalError):
    type = "model_contract_error"
