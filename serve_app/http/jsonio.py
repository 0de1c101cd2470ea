"""JSON in: bytes to checked values, and every way that fails as a sentence that says what to change.

Owns: translating the decoder's errors, finding duplicate keys, keeping big bodies from stopping the
event loop. Must not know: routes, tensors.
The shapes are msgspec Structs (unknown fields forbidden); RFC 8259 is the grammar, so NaN and
Infinity are no JSON.
"""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from deployments.core.errors import MalformedRequest, RequestTooLarge

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_INDEX = re.compile(r"\[[^]]*\]")
_NAME_SHOWN = 60

GC_OFF_FROM_BYTES = 256 * 1024
"""Bodies from this size are decoded with the garbage collector off: it walks all that was built again
and again. 16 MiB of `[],` take 5.4 s with it on a 2-core machine, 0.4 s without."""

Item = object
"""Stands for `Any` in the Structs of big bodies: the decoder hands each one to a hook, which counts."""


class Shape:
    """A decoder for one kind of request body, with the fields that each of its objects may have.

    objects: path of an object ("parameters"), or of a list of them ("inputs"), to its Struct; only
    those listed can name their allowed fields in an error.
    """

    def __init__(self, body: type[msgspec.Struct], **objects: type[msgspec.Struct]) -> None:
        self.fields = {"": body.__struct_encode_fields__}
        self.fields |= {path: kind.__struct_encode_fields__ for path, kind in objects.items()}
        self._quoted = [f'"{name}"'.encode() for name in self.fields[""]]

    def allowed_at(self, path: str) -> tuple[str, ...]:
        """Field names of the object at `path`; a list's elements share the list's entry."""
        return self.fields.get(_INDEX.sub("", path), ())

    def may_repeat_a_key(self, body: bytes) -> bool:
        """Cheap and never wrong when it says no (a key spelt with escapes aside)."""
        for name in self._quoted:  # noqa: SIM110 (a generator costs 1 us, on every request)
            if body.count(name) > 1:
                return True
        return False


def decode(decoder: "msgspec.json.Decoder[T]", shape: Shape, body: bytes) -> T:
    """`body` as the decoder's type, or MalformedRequest with the place and the remedy."""
    if len(body) < GC_OFF_FROM_BYTES:
        return _decode(decoder, shape, body)
    with _collector_off():
        return _decode(decoder, shape, body)


def decode_counted(kind: type[T], shape: Shape, body: bytes, *, limit: int, param: str) -> T:
    """`decode` for a big body: the list whose elements are `Item` is given up after `limit` of them.

    One call of Python an item: dear for nothing where the body is small, and nothing at all beside
    a million items that are built only to be counted.
    """
    count = 0

    def keep(_: type, value: Any) -> Any:
        nonlocal count
        count += 1
        if count > limit:
            raise too_many_items(None, limit, param=param)
        return value

    return decode(msgspec.json.Decoder(kind, dec_hook=keep), shape, body)


def too_many_items(count: int | None, limit: int, *, param: str) -> RequestTooLarge:
    """count: None where nobody counted to the end."""
    found = f"{count} items are" if count is not None else "the request's items are"
    return RequestTooLarge(
        f"{found} over max_items_per_request, {limit}; send fewer in one request", param=param
    )


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _decode(decoder: "msgspec.json.Decoder[T]", shape: Shape, body: bytes) -> T:
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_shape(str(error), shape) from None
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(_why_not_json(error, body)) from None
    if shape.may_repeat_a_key(body):
        refuse_duplicates(body)
    return value


def _wrong_shape(text: str, shape: Shape) -> MalformedRequest:
    match = _AT.match(text)
    assert match is not None  # the pattern takes any text
    what, path = match["what"], match["path"] or ""
    unknown = _UNKNOWN.match(what)
    if unknown is None:
        where = f"`{path}`: " if path else "the body: "
        return MalformedRequest(f"{where}{what[0].lower()}{what[1:]}", param=path or None)
    name = unknown["name"][:_NAME_SHOWN]
    place = f" in `{path}`" if path else ""
    allowed = ", ".join(shape.allowed_at(path))
    return MalformedRequest(
        f"unknown field {name!r}{place}; allowed: {allowed}",
        param=f"{path}.{name}" if path else name,
    )


def _why_not_json(error: Exception, body: bytes) -> str:
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "the body is not valid UTF-8"
    text = str(error)
    if not body.strip():
        return "the body is empty; send a JSON object"
    # msgspec calls a lone high surrogate at the end of a string "truncated".
    if "surrogate" in text or ("truncated" in text and _ends_in_surrogate(body)):
        return "the body has a lone UTF-16 surrogate (\\ud800 to \\udfff) in a string; send a pair"
    if "truncated" in text:
        return "the body is not JSON: it ends too early"
    detail = text.removeprefix("JSON is malformed: ")
    hint = " (NaN and Infinity are no JSON)" if b"NaN" in body or b"Infinity" in body else ""
    return f"the body is not JSON: {detail}{hint}"


def _ends_in_surrogate(body: bytes) -> bool:
    return re.search(rb'\\u[dD][89abAB][0-9a-fA-F]{2}"', body) is not None


def refuse_duplicates(body: bytes) -> None:
    """Raise where the top-level object has a key twice (RFC 8259 leaves the meaning open).

    Values are skipped, not built: 60 ms for 16 MiB.
    """
    seen: set[object] = set()

    def see(_: type, name: Any) -> Any:
        if name in seen:
            raise MalformedRequest(
                f"field {name!r:.{_NAME_SHOWN}} is there twice", param=str(name)[:_NAME_SHOWN]
            )
        seen.add(name)
        return name

    msgspec.json.decode(body, type=dict[Item, msgspec.Raw], dec_hook=see)
