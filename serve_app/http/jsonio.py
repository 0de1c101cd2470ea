"""JSON in: bytes to checked values, and every way that fails as a sentence that says what to change.

Owns: translating the decoder's errors, finding duplicate keys. Must not know: routes, tensors.
The shapes are msgspec Structs (unknown fields forbidden); RFC 8259 is the grammar, so NaN and
Infinity are no JSON.
"""

import json
import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from deployments.core.errors import MalformedRequest

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_INDEX = re.compile(r"\[[^]]*\]")
_NAME_SHOWN = 60


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
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_shape(str(error), shape) from None
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(_why_not_json(error, body)) from None
    if shape.may_repeat_a_key(body):
        refuse_duplicates(body, shape.fields[""])
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


def refuse_duplicates(body: bytes, names: Iterable[str]) -> None:
    """Raise where the top-level object has one of `names` twice (RFC 8259 leaves the meaning open)."""
    wanted = set(names)
    top: list[tuple[str, object]] = []

    def keep(pairs: list[tuple[str, object]]) -> None:
        top[:] = pairs  # objects end inside out, so the last one kept is the body itself

    try:
        json.loads(body, object_pairs_hook=keep, parse_int=len, parse_float=len)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(_why_not_json(error, body)) from None
    seen: set[str] = set()
    for name, _ in top:
        if name in seen and name in wanted:
            raise MalformedRequest(f"field {name!r} is there twice", param=name)
        seen.add(name)
