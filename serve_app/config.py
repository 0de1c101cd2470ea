"""What may stand under `args` and `user_config` of our applications, and within which bounds.

Owns: names, types, bounds and defaults of the keys (CONTRACT: "Applications in config.yaml"); the
core gets a frozen `Limits`. Ray calls the builder with `DynamicArgs` parsed by pydantic, so its
errors must name key and nearest right one by themselves, under a plain `serve run` too. Must not
know: Ray, files.
"""

import difflib
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.core.contract import Limits
from deployments.core.variants import check as check_variants

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

# Strict: a bool is no number here, and "32" is a string. The upper bounds only catch slips (seconds
# for milliseconds, a byte too many); nothing is allocated by them.
Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
Slots = Annotated[int, Field(strict=True, ge=1, le=64)]
Bytes = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Cost = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
WaitMs = Annotated[float, Field(strict=True, ge=0, le=60_000, allow_inf_nan=False)]
TimeoutMs = Annotated[float, Field(strict=True, gt=0, le=86_400_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)]
Sequences = Annotated[int, Field(strict=True, ge=1, le=4096)]
Threads = Annotated[int, Field(strict=True, ge=1, le=1024)]
Streams = Annotated[int, Field(strict=True, ge=1, le=100_000)]
Share = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
LEAST_MEMORY = 2**20


def _memory(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (0 < value <= 1 or (value == int(value) and LEAST_MEMORY <= value <= 2**50)):
        raise ValueError(
            f"a share above 0 and up to 1 (0.9), or bytes as a whole number from {LEAST_MEMORY} (a MiB) on"
        )
    return float(value) if value <= 1 else int(value)


Memory = Annotated[float, BeforeValidator(_memory)]
QueueS = Literal["auto"] | Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)]

_MODEL = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", re.ASCII)
_DEFAULTS = Limits()
_LIMITS = frozenset(field.name for field in fields(Limits))
HEADROOM = 512
"""Requests that Ray lets in above our own bound, so that it is we who answer 503, at once and with
an honest Retry-After; beyond it Ray's own queue holds them."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ ": did you mean 'x'?" for the closest known word, or the list of all where none is close."""
    words = sorted(known)
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    if close:
        return f": did you mean {close[0]!r}?"
    return f"; known: {', '.join(words)}"


class _Checked(BaseModel):
    """Refuses unknown keys and names the nearest right one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                error.title, [_explained(problem, cls.model_fields) for problem in error.errors()]
            ) from None


def _explained(problem: Any, known: Iterable[str]) -> InitErrorDetails:
    """The same problem; an unknown key gets its nearest right one."""
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        kind = "unknown_key"
        message = f"unknown key {problem['loc'][0]!r}{nearest(str(problem['loc'][0]), known)}"
    # Braces would be read as placeholders of the template.
    text = PydanticCustomError(kind, message.replace("{", "{{").replace("}", "}}"))
    return InitErrorDetails(type=text, loc=problem["loc"], input=problem["input"])


class ModelArgs(_Checked):
    """What every application of ours takes."""

    model: str
    model_args: dict[str, Any] = Field(default_factory=dict)
    threads: Threads | None = None
    memory: Memory = _DEFAULTS.memory
    optimise: tuple[str, ...] = ()
    max_error: Share | None = None
    allow_batch_dependence: Annotated[bool, Field(strict=True)] = False
    max_queue_items: Count = _DEFAULTS.max_queue_items
    max_queue_s: QueueS = "auto"
    max_items_per_request: Count = _DEFAULTS.max_items_per_request
    max_body_bytes: Bytes = _DEFAULTS.max_body_bytes
    timeout_ms: TimeoutMs = _DEFAULTS.timeout_ms

    @field_validator("model")
    @classmethod
    def _is_module_and_class(cls, value: str) -> str:
        if not _MODEL.match(value):
            raise ValueError(f"{value!r} is not of the form 'module:Class', as in 'my_model:Doubler'")
        return value

    @field_validator("optimise", mode="before")
    @classmethod
    def _are_variants(cls, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError("a list of variants, as in [packed] or [int8]")
        return check_variants(value)

    @model_validator(mode="after")
    def _fits_the_queue(self) -> Self:
        _require_fit(self.limits(), self.model_fields_set)
        return self

    def limits(self) -> Limits:
        """The bounds as the core takes them."""
        given = {key: getattr(self, key) for key in type(self).model_fields if key in _LIMITS}
        given["max_queue_s"] = None if self.max_queue_s == "auto" else self.max_queue_s
        if "max_items_per_request" not in self.model_fields_set:
            # A queue made smaller than the default list takes no longer lists; no need to say both.
            given["max_items_per_request"] = min(self.max_items_per_request, self.max_queue_items)
        return Limits(**given)


class DynamicArgs(ModelArgs):
    """`args` of an application built by `serve_app.builder:dynamic`."""

    max_batch_size: Count = _DEFAULTS.max_batch_size
    max_batch_cost: Cost | None = None
    batch_wait_ms: WaitMs = _DEFAULTS.batch_wait_ms
    slots: Slots = _DEFAULTS.slots
    safety: Literal["auto", "shared", "pool", "processes", "exclusive"] = "auto"
    max_queue_cost: Cost | None = None

    @property
    def asks_for_batches(self) -> bool:
        """Whether a batch size of more than one was named, not only left at its default."""
        return "max_batch_size" in self.model_fields_set and self.max_batch_size > 1

    @model_validator(mode="after")
    def _has_slots_for_its_safety(self) -> Self:
        if self.safety in ("exclusive", "processes") and self.slots > 1:
            raise ValueError(
                f"slots: safety={self.safety} allows one slot in a replica, not {self.slots}; set slots: 1 "
                f"and num_replicas: {self.slots} in the deployment, or safety: pool"
            )
        return self


class ContinuousArgs(ModelArgs):
    """`args` of an application built by `serve_app.builder:continuous`."""

    max_sequences: Sequences = _DEFAULTS.max_sequences
    max_tokens_in_step: Count = _DEFAULTS.max_tokens_in_step
    kv_bytes: Bytes | None = None
    max_streams: Streams = _DEFAULTS.max_streams
    idle_timeout_s: Seconds = _DEFAULTS.idle_timeout_s
    max_stream_s: Seconds = _DEFAULTS.max_stream_s


class _UserConfig(_Checked):
    """`user_config` of a model deployment: limits to change in place, without a restart.

    draining, drain_grace_s: the launcher's, when it stops.
    """

    draining: Annotated[bool, Field(strict=True)] = False
    drain_grace_s: Seconds | None = None
    max_queue_items: Count | None = None
    max_queue_s: QueueS | None = None
    max_items_per_request: Count | None = None
    max_body_bytes: Bytes | None = None
    timeout_ms: TimeoutMs | None = None

    def apply(self, limits: Limits) -> Limits:
        """`limits` with what is set here changed; raises ValueError where they don't fit together."""
        changes: dict[str, Any] = {
            key: value
            for key, value in self.model_dump(exclude={"draining", "drain_grace_s"}).items()
            if value is not None
        }
        if changes.get("max_queue_s") == "auto":
            changes["max_queue_s"] = None
        if "max_queue_items" in changes and "max_items_per_request" not in changes:
            changes["max_items_per_request"] = min(limits.max_items_per_request, changes["max_queue_items"])
        changed = replace(limits, **changes)
        _require_fit(changed, set(changes))
        self._require_door(changed, limits)
        return changed

    def _require_door(self, changed: Limits, base: Limits) -> None:
        raise NotImplementedError


class ModelUserConfig(_UserConfig):
    """Of a dynamic application. Not `slots`: each is a thread with an instance, made at start."""

    max_batch_size: Count | None = None
    max_batch_cost: Cost | None = None
    batch_wait_ms: WaitMs | None = None
    max_queue_cost: Cost | None = None
    memory: Memory | None = None

    def _require_door(self, changed: Limits, base: Limits) -> None:
        """Beyond what Ray lets in, a longer queue would never fill: Ray's own would, without our 503."""
        wanted = changed.max_queue_items + changed.slots * changed.max_batch_size
        if wanted > let_in(base):
            most = let_in(base) - changed.slots * changed.max_batch_size
            raise _over_the_door("max_queue_items", changed.max_queue_items, most)


class ContinuousUserConfig(_UserConfig):
    """Of a continuous application. Not `max_sequences`, `kv_bytes`, `max_tokens_in_step` and `memory`: room
    is made for them at start."""

    max_streams: Streams | None = None
    idle_timeout_s: Seconds | None = None
    max_stream_s: Seconds | None = None

    def _require_door(self, changed: Limits, base: Limits) -> None:
        # The states of streams have their room from the start.
        for key in ("max_streams", "max_queue_items"):
            if getattr(changed, key) > getattr(base, key):
                raise _over_the_door(key, getattr(changed, key), getattr(base, key))


def _require_fit(limits: Limits, given: set[str]) -> None:
    if limits.max_items_per_request > limits.max_queue_items:
        at_fault = "max_items_per_request" if "max_items_per_request" in given else "max_queue_items"
        raise ValueError(
            f"{at_fault}: a request of max_items_per_request={limits.max_items_per_request} items "
            f"could never fit max_queue_items={limits.max_queue_items}; make the first at most "
            "the second"
        )
    queue, batch = limits.max_queue_cost, limits.max_batch_cost
    if queue is not None and batch is not None and queue < batch:
        at_fault = "max_queue_cost" if "max_queue_cost" in given else "max_batch_cost"
        raise ValueError(
            f"{at_fault}: a queue of max_queue_cost={queue:g} could never fill a batch of "
            f"max_batch_cost={batch:g}; make the first at least the second"
        )


def let_in(limits: Limits) -> int:
    """Requests that Ray is told to let into a replica (`max_ongoing_requests`), fixed at build."""
    return limits.max_queue_items + limits.slots * limits.max_batch_size + HEADROOM


def let_in_streams(limits: Limits) -> int:
    """The same for a continuous application: each open stream is a request to Ray."""
    return limits.max_streams + limits.max_queue_items + HEADROOM


def _over_the_door(key: str, wanted: int, most: int) -> ValueError:
    return ValueError(
        f"{key}: {wanted} in user_config is more than the replica lets in; "
        f"at most {most} here, or raise {key} in `args` (a restart)"
    )


def problems_of(error: ValidationError) -> list[tuple[str, str]]:
    """(key, message) for each thing wrong, without pydantic's own phrases."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        unknown = problem["type"] == "unknown_key"
        # pydantic names the member of a union ("constrained-float") where it failed: not a key
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(p for p in parts if not p.startswith(("constrained-", "literal[", "float")))
        message = problem["msg"].removeprefix("Value error, ")
        if key in found and not unknown:
            message = f"{found[key].removesuffix(_got(problem))}, or: {message}"
        if not unknown and problem["type"] != "missing" and key:
            message += _got(problem)
        found[key] = message
    return list(found.items())


def _got(problem: Any) -> str:
    return f" (got {problem['input']!r:.80})"
