"""Fake services for the HTTP tests: no model, no batcher, every outcome on demand.

Texts: an item that is no string is refused; "poison", "late", "long" fail or warn alone; "full",
"stopping", "bug" fail the request. Pictures: bytes or {"image_b64"}. Pairs: two numeric inputs.
A language model says its prompt again, a word a token; a prompt in SCRIPTS does something else.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from starlette.types import ASGIApp

from deployments.core import errors
from deployments.core.contract import (
    Answer,
    Generation,
    Limits,
    ModelCard,
    Outcome,
    OutputStream,
    RequestOptions,
    TensorSpec,
)
from deployments.core.generation import Delta, FinishReason, GenerationRequest, TokenLogprob
from serve_app.http.app import make_app

PREFIX = "/app"
DIMENSIONS = 4

TEXT_CARD = ModelCard(
    name="embed",
    inputs=(TensorSpec("text", "BYTES", (-1,)),),
    outputs=(TensorSpec("embedding", "FP32", (-1, DIMENSIONS)),),
    item_schema={"type": "string"},
    output_schema={"type": "array", "items": {"type": "number"}},
    examples=("A small text.",),
    embeds=True,
    cost_unit="tokens",
)
PICTURE_CARD = ModelCard(
    name="classify",
    inputs=(TensorSpec("image", "BYTES", (-1,)),),
    outputs=(TensorSpec("index", "INT64", (-1, 2)), TensorSpec("label", "BYTES", (-1, 2))),
    media_types=("image/jpeg", "image/png"),
    item_key="image_b64",
    item_schema={
        "type": "object",
        "properties": {"image_b64": {"type": "string", "pattern": "^([A-Za-z0-9+/]{4})*$"}},
        "required": ["image_b64"],
        "additionalProperties": False,
    },
    output_schema={"type": "array"},
)
PAIR_CARD = ModelCard(
    name="pair",
    inputs=(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,))),
    outputs=(TensorSpec("sum", "FP32", (-1, 2)), TensorSpec("sign", "BOOL", (-1,))),
    item_schema={"type": "object"},
)
CHAT_CARD = ModelCard(
    name="chat",
    inputs=(TensorSpec("prompt", "BYTES", (-1,)),),
    outputs=(TensorSpec("text", "BYTES", (-1,)),),
    item_schema={"type": "string"},
    output_schema={"type": "object"},
    examples=("Say it again.",),
    cost_unit="tokens",
    generates=True,
    context_tokens=256,
)


class FakeService:
    """The Service Protocol without anything behind it; keeps what it was asked."""

    def __init__(self, card: ModelCard = TEXT_CARD, limits: Limits | None = None) -> None:
        self._card = card
        self._limits = limits or Limits(max_items_per_request=8, max_body_bytes=1 << 20)
        self.ready = True
        self.calls: list[tuple[list[Any], RequestOptions]] = []
        self.counted: list[tuple[int, str]] = []
        self.hung = asyncio.Event()
        self.asked: list[int] = []
        self.has_room = True

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def limits(self) -> Limits:
        return self._limits

    def is_ready(self) -> bool:
        return self.ready

    def stats(self) -> Mapping[str, Any]:
        return {"requests": len(self.calls)}

    def count_outcome(self, status: int, *, route: str) -> None:
        self.counted.append((status, route))

    def check_room(self, items: int) -> None:
        self.asked.append(items)
        if not self.has_room:
            raise errors.Overloaded("no room within the allowed wait", retry_after_s=3)

    async def predict(self, items: Sequence[Any], options: RequestOptions) -> Answer:
        self.calls.append((list(items), options))
        if "full" in items:
            raise errors.Overloaded("no room within the allowed wait", retry_after_s=3)
        if "stopping" in items:
            raise errors.Draining("this server is stopping")
        if "bug" in items:
            raise RuntimeError("secret detail")
        if "hang" in items:
            self.hung.set()
            await asyncio.Event().wait()
        return Answer([self._one(item, options) for item in items], 1.2, 17, 8.4)

    def _one(self, item: Any, options: RequestOptions) -> Outcome:
        if self._card.name == "classify":
            return _picture(item, options)
        if self._card.name == "pair":
            return _pair(item)
        return _text(item, options)


def vector_of(text: str) -> list[float]:
    digest = hashlib.sha256(text.encode()).digest()
    return [byte / 256 for byte in digest[:DIMENSIONS]]


def _text(item: Any, options: RequestOptions) -> Outcome:
    if not isinstance(item, str):
        return Outcome(error=errors.InvalidItem("the item must be a string"))
    if item == "poison":
        failed = errors.ModelFailed("the model failed on this item")
        failed.__cause__ = ValueError("secret detail")
        return Outcome(error=failed)
    if item == "late":
        return Outcome(error=errors.DeadlinePassed("not begun by its deadline"))
    if item == "object":
        return Outcome(value=object())
    vector = vector_of(item)
    value = {"embedding": np.array(vector, dtype="f4")} if options.as_tensors else vector
    warning = ("truncated", "cut at 256 tokens") if item == "long" else None
    return Outcome(value=value, warning=warning, cost=len(item.split()))


def _picture(item: Any, options: RequestOptions) -> Outcome:
    if isinstance(item, dict):
        try:
            (text,) = (item.pop("image_b64"), *item)
            item = base64.b64decode(text, validate=True)
        except (KeyError, TypeError, ValueError):
            return Outcome(error=errors.InvalidItem("the item must have image_b64 in base64"))
    if not isinstance(item, bytes):
        return Outcome(error=errors.InvalidItem("the item must be an image"))
    if options.as_tensors:
        value = {"index": np.array([len(item), 0]), "label": [f"{len(item)} bytes", "Käse"]}
        return Outcome(value=value)
    return Outcome(value=[{"label": f"{len(item)} bytes", "index": len(item)}])


def _pair(item: Any) -> Outcome:
    if not isinstance(item, dict) or set(item) != {"a", "b"}:
        return Outcome(error=errors.InvalidItem("the item must have a and b"))
    total = np.asarray(item["a"], dtype="f4") + np.float32(item["b"])
    return Outcome(value={"sum": total, "sign": np.bool_(total[0] > 0)})


PAUSE = "pause"
HANG = "hang"
Event = Delta | Exception | str
"""What a fake choice does next: gives a delta, fails, ends a batch of deltas, or waits for ever."""


class FakeChoice:
    """One OutputStream out of a script; notes its reads and its end."""

    def __init__(self, script: Iterator[Event]) -> None:
        self._script = script
        self._ahead: Event | None = None
        self.reads = 0
        self.closed = 0

    async def read(self) -> Sequence[Delta]:
        self.reads += 1
        await asyncio.sleep(0)
        ready: list[Delta] = []
        while (event := self._next()) is not None:
            if isinstance(event, Delta):
                ready.append(event)
            elif ready:
                self._ahead = event
                break
            elif event == HANG:
                await asyncio.Event().wait()
            elif isinstance(event, Exception):
                raise event
        return ready

    def _next(self) -> Event | None:
        event, self._ahead = self._ahead, None
        return event if event is not None else next(self._script, None)

    async def feed(self, data: bytes) -> None:
        raise errors.InvalidItem("this model takes no chunks")

    def end_input(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


def words_of(text: str) -> list[str]:
    """Each with the space before it."""
    return re.findall(r" *[^ ]+| +$", text) or [""]


def said(text: str, request: GenerationRequest) -> Iterator[Event]:
    """`text`, a word a token, cut at max_tokens; the last of every three waits for its batch."""
    words = words_of(text)
    most = min(len(words), request.max_tokens or len(words))
    for count, word in enumerate(words[:most], start=1):
        is_last = count == most
        reason = FinishReason.LENGTH if most < len(words) else FinishReason.STOP
        logprobs = () if request.sampling.top_logprobs is None else (logprob_of(word, request),)
        yield Delta(word, count, 2, logprobs, reason if is_last else None)
        if count % 3 == 0:
            yield PAUSE


def logprob_of(word: str, request: GenerationRequest) -> TokenLogprob:
    tops = [TokenLogprob(f"{word}{i}", -float("inf"), f"{word}{i}".encode()) for i in range(20)]
    return TokenLogprob(word, -0.5, word.encode(), tuple(tops[: request.sampling.top_logprobs]))


def endless() -> Iterator[Event]:
    for count in range(1, 1_000_000):
        yield Delta("word " * 200, count)
        yield PAUSE


SCRIPTS: dict[str, Callable[[], Iterator[Event]]] = {
    "hang": lambda: iter([HANG]),
    "hang later": lambda: iter([Delta("a", 1), PAUSE, HANG]),
    "break": lambda: iter([errors.ModelFailed("the model failed on this sequence")]),
    "break later": lambda: iter(
        [Delta("a", 1), PAUSE, errors.ModelFailed("the model failed on this sequence")]
    ),
    "bug later": lambda: iter([Delta("a", 1), PAUSE, RuntimeError("secret detail")]),
    "late": lambda: iter([errors.DeadlinePassed("not begun by its deadline")]),
    "silent": lambda: iter(
        [Delta("", 1), PAUSE, Delta("", 2), PAUSE, Delta("b", 3, 0, (), FinishReason.STOP)]
    ),
    "no reason": lambda: iter([Delta("a", 1), PAUSE]),
    "endless": endless,
}


class FakeTextService(FakeService):
    """The TextService Protocol; keeps the requests it was asked and the choices it gave."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(CHAT_CARD, limits)
        self.asked_for: list[GenerationRequest] = []
        self.choices: list[FakeChoice] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], options: RequestOptions
    ) -> list[Generation]:
        for request in requests:
            self._check(request, options)
        return [self._generation(request) for request in requests]

    def _check(self, request: GenerationRequest, options: RequestOptions) -> None:
        self.asked_for.append(request)
        self.calls.append(([request], options))
        text = prompt_text(request)
        if text == "full":
            raise errors.Overloaded("no room within the allowed wait", retry_after_s=3)
        if text == "bug":
            raise RuntimeError("secret detail")
        if text == "too long":
            raise errors.ContextLengthExceeded("300 tokens are over the context of 256", param="messages")
        if text == "unfit":
            raise errors.InvalidItem("token 7 is not in the vocabulary", param="prompt")

    def _generation(self, request: GenerationRequest) -> Generation:
        text = prompt_text(request)
        script = SCRIPTS.get(text, lambda: said(text, request))
        choices = [FakeChoice(script()) for _ in range(request.n)]
        self.choices += choices
        return Generation(choices, prompt_tokens=len(words_of(text)))

    def open_stream(self, item: Any, options: RequestOptions) -> OutputStream:
        return FakeChoice(iter([Delta(str(item), 1, 0, (), FinishReason.STOP)]))

    def _one(self, item: Any, options: RequestOptions) -> Outcome:
        if not isinstance(item, str):
            return Outcome(error=errors.InvalidItem("the item must be a string"))
        if options.as_tensors:
            return Outcome(value={"text": item})
        return Outcome(value={"text": item, "finish_reason": "stop", "usage": {}})


def prompt_text(request: GenerationRequest) -> str:
    if request.messages is not None:
        return str(request.messages[-1]["content"])
    return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt or ()))


def prefixed(app: ASGIApp, prefix: str = PREFIX) -> httpx.ASGITransport:
    return httpx.ASGITransport(app, raise_app_exceptions=False, root_path=prefix)


@asynccontextmanager
async def client_of(service: FakeService, **options: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base URL is the application's prefix."""
    transport = prefixed(make_app(service, **options))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield client
