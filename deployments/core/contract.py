"""The seams of a replica: what HTTP asks of it (`Service`) and the values that cross.

Owns: the Protocols and frozen values shared by serve_app/http, the batcher, the runtime and the Ray
shells. Must not know: Ray, torch, HTTP status codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from deployments.core.errors import ServingError
from deployments.core.generation import GenerationRequest

PRIORITY_RANGE = (-10, 10)
"""Lower numbers are served first; 0 is the default (CONTRACT: `parameters.priority`)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a replica may hold and for how long; parsed once at build, units in the names.

    `max_batch_cost` is in the model's own cost unit (tokens, pixels); None: items alone bound a
    batch. `max_queue_cost` None: 64 batches' worth. `max_queue_s` None: "auto", see
    deployments/core/overload.py. `memory`: bytes, or up to 1 a share of what the replica may have.
    """

    max_batch_size: int = 32
    max_batch_cost: float | None = None
    batch_wait_ms: float = 0.0
    slots: int = 1
    max_queue_items: int = 1024
    max_queue_cost: float | None = None
    max_queue_s: float | None = None
    max_items_per_request: int = 256
    max_body_bytes: int = 16 * 1024 * 1024
    timeout_ms: float = 30_000.0
    memory: float = 0.9
    # continuous batching only
    max_sequences: int = 16
    max_tokens_in_step: int = 256
    kv_bytes: int | None = None
    max_streams: int = 1024
    idle_timeout_s: float = 30.0
    max_stream_s: float = 3600.0


class Streams(Enum):
    """What a continuous application's `/stream` takes; NONE: it has no such route."""

    NONE = "none"
    REQUEST = "request"  # one JSON request, outputs stream
    CHUNKS = "chunks"  # bytes without end, outputs stream meanwhile; /ws too


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the Open Inference Protocol: name, datatype ("FP32", "BYTES"), shape with -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the HTTP layer may know of a model; built once at start.

    media_types: raw bodies the model reads itself; such an item is the body's `bytes`.
    item_key: the JSON field that carries the same bytes in base64 (classify: "image_b64"), or None.
    item_schema, output_schema: JSON Schemas of one item and one output, for /openapi.json.
    examples: a few JSON items, shown in /docs and used for warm-up.
    embeds: one item in gives one float vector out, so /v1/embeddings fits.
    cost_unit: what `Outcome.cost` counts ("tokens", "items", ...).
    streams: what `/stream` takes. generates: a language model, so /v1/chat/completions and
    /v1/completions fit it (the service is a TextService then). context_tokens: prompt and output
    together, of such a model. one_item: a /v2 input tensor is one item as a whole (a recording), its
    first dimension no count of items; the item handed to `predict` is then the numpy array.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    media_types: tuple[str, ...] = ()
    item_key: str | None = None
    item_schema: Mapping[str, Any] = field(default_factory=dict)
    output_schema: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Any, ...] = ()
    embeds: bool = False
    cost_unit: str = "items"
    streams: Streams = Streams.NONE
    generates: bool = False
    context_tokens: int = 0
    one_item: bool = False


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a caller may ask for besides the items; the HTTP layer has checked the ranges.

    timeout_ms: the work must *begin* within it, else DeadlinePassed; None: the application's own.
    body_bytes: size of the request's body, so that big ones are preprocessed off the event loop.
    as_tensors: outputs stay as the model gave them (for binary protocols), not as JSON values.
    """

    request_id: str = ""
    timeout_ms: float | None = None
    priority: int = 0
    body_bytes: int = 0
    as_tensors: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of one item: exactly one of `value` and `error` counts.

    value: a JSON value; with `as_tensors` a dict of output name -> array without the batch
    dimension (numpy, or list[str|bytes] for BYTES). warning: (type, message), what was done to the
    item but should be known, or None. cost: in the model's unit.
    """

    value: Any = None
    error: ServingError | None = None
    warning: tuple[str, str] | None = None
    cost: float = 1.0


@dataclass(slots=True)
class Answer:
    """All outcomes of one request in the order of its items, and where its time went.

    queue_ms: from arrival until its last item began. batch_size: the size of the batch that item
    ran in (0: never ran). model_ms: how long that batch's model run took.
    """

    outcomes: list[Outcome]
    queue_ms: float = 0.0
    batch_size: int = 0
    model_ms: float = 0.0


class Service(Protocol):
    """A replica as the HTTP layer sees it. All methods run on the replica's event loop."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def limits(self) -> Limits: ...

    def is_ready(self) -> bool:
        """False while loading or draining."""
        ...

    def check_room(self, items: int) -> None:
        """Raise Refusal where `items` more would not be let in now: asked before a big body is read."""
        ...

    async def predict(self, items: Sequence[Any], options: RequestOptions) -> Answer:
        """Run all items; one outcome each, in order.

        Raises Refusal where the request as a whole is not taken (none of its items has begun then)
        and RequestTooLarge where it never could be. A per-item failure is an outcome, not a raise.
        Cancelling the call takes every item that has not begun out of the queue.
        """
        ...

    def stats(self) -> Mapping[str, Any]:
        """This replica's figures, JSON-ready; schema in docs/reference/stats.md."""
        ...

    def count_outcome(self, status: int, *, route: str) -> None:
        """Count one finished HTTP request by its status (499: the client left)."""
        ...


class OutputStream(Protocol):
    """One sequence as its consumer sees it; all calls on the replica's event loop, one reader."""

    async def read(self) -> Sequence[Any]:
        """All outputs that are ready, in order, waiting for at least one; empty: the sequence is done.

        Raises the ServingError that ended it. Outputs not read yet are bounded: a slow reader slows
        its own sequence.
        """
        ...

    async def feed(self, data: bytes) -> None:
        """More input (Streams.CHUNKS). Waits while the engine is behind; raises what ended the stream."""
        ...

    def end_input(self) -> None:
        """No more input comes: what was fed is finished, then `read` gives the end."""
        ...

    def close(self) -> None:
        """The consumer leaves: frees all before the next step. Idempotent, also after the end."""
        ...


class StreamingService(Service, Protocol):
    """A replica whose sequences join and leave at every step."""

    def open_stream(self, item: Any, options: RequestOptions) -> OutputStream:
        """Queue one sequence: `item` is its JSON request, None for Streams.CHUNKS.

        Raises Refusal (no room, or max_streams are open), InvalidItem where the model can't take it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """A request to a language model under way: one stream of `Delta` a choice, in order."""

    choices: Sequence[OutputStream]
    prompt_tokens: int

    def close(self) -> None:
        """Free all choices; idempotent."""
        for choice in self.choices:
            choice.close()


class TextService(StreamingService, Protocol):
    """A language model's replica."""

    async def generate(
        self, requests: Sequence[GenerationRequest], options: RequestOptions
    ) -> list[Generation]:
        """Queue all choices of all prompts of one HTTP request, or none. In time is who has begun one.

        Raises InvalidItem (param: the field of the request), ContextLengthExceeded, Refusal.
        """
        ...
