"""Fake services for the HTTP tests: no model, no batcher, every outcome on demand.

Texts: an item that is no string is refused; "poison", "late", "long" fail or warn alone; "full",
"stopping", "bug" fail the request. Pictures: bytes or {"image_b64"}. Pairs: two numeric inputs.
"""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from starlette.types import ASGIApp

from deployments.core import errors
from deployments.core.contract import Answer, Limits, ModelCard, Outcome, RequestOptions, TensorSpec
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


def prefixed(app: ASGIApp, prefix: str = PREFIX) -> httpx.ASGITransport:
    return httpx.ASGITransport(app, raise_app_exceptions=False, root_path=prefix)


@asynccontextmanager
async def client_of(service: FakeService, **options: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base URL is the application's prefix."""
    transport = prefixed(make_app(service, **options))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield client
