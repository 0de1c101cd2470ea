"""Content types: which one a body has, and the items of raw media and multipart bodies.

Owns: Content-Type parsing (RFC 9110, 8.3) and multipart/form-data (RFC 7578). Must not know: what the
media hold; the model reads them itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.core.errors import MalformedRequest, RequestTooLarge, UnsupportedMedia

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

JSON_MEDIA = "application/json"
FORM_MEDIA = "multipart/form-data"


@dataclass(frozen=True, slots=True)
class ContentType:
    """A media type in lower case, with its parameters."""

    media: str
    parameters: Mapping[bytes, bytes]


def parse_content_type(header: bytes | None) -> ContentType:
    """Without a header a body counts as JSON. Raises for a charset other than UTF-8 on JSON."""
    if not header:
        return ContentType(JSON_MEDIA, {})
    media, parameters = parse_options_header(header)
    charset = parameters.get(b"charset", b"utf-8").lower()
    if media == b"application/json" and charset not in (b"utf-8", b"utf8", b"us-ascii"):
        shown = charset[:40].decode("latin-1")
        raise UnsupportedMedia(f"JSON is read as UTF-8 only, not as {shown!r}; send charset=utf-8")
    return ContentType(media.decode("latin-1"), parameters)


def unsupported(media: str, accepted: Sequence[str]) -> UnsupportedMedia:
    """The refusal of a content type: names what is taken, and curl's usual trap."""
    names = ", ".join(accepted)
    if media == "application/x-www-form-urlencoded":
        return UnsupportedMedia(
            "content-type application/x-www-form-urlencoded (what curl -d sends by itself) is not"
            f" read; add -H 'content-type: {accepted[0]}'; accepted: {names}"
        )
    return UnsupportedMedia(f"content-type {media[:80]!r} is not read; accepted: {names}")


@dataclass(slots=True)
class Part:
    """One part of a form while it is read. `is_file`: it has a file name."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    name: str = ""
    is_file: bool = False
    media: str = ""


class _FormReader:
    """Collects the parts of a form from the parser's callbacks; refuses too many at once.

    How many headers a part has and how long they are, the parser bounds itself.
    """

    def __init__(self, max_files: int) -> None:
        self.parts: list[Part] = []
        self.is_complete = False
        self._max_parts = max_files + 1  # and one "parameters"
        self._max_files = max_files
        self._name = bytearray()
        self._value = bytearray()

    def on_part_begin(self) -> None:
        if len(self.parts) == self._max_parts:
            raise RequestTooLarge(f"the form has over {self._max_files} files (max_items_per_request)")
        self.parts.append(Part())

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self.parts[-1].headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        part = self.parts[-1]
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        part.is_file = b"filename" in options
        media, _ = parse_options_header(part.headers.get(b"content-type", b""))
        part.media = media.decode("latin-1")

    def on_end(self) -> None:
        self.is_complete = True


@dataclass(frozen=True, slots=True)
class Form:
    """files: the items, in order; parameters: the JSON text of the field of that name, or None."""

    files: list[bytes]
    parameters: bytes | None


def read_form(body: bytes, content_type: ContentType, *, media_types: Sequence[str], max_files: int) -> Form:
    """The files of a multipart/form-data body. A part's own type, where it gives one, is checked."""
    boundary = content_type.parameters.get(b"boundary")
    if not boundary:
        raise MalformedRequest("multipart/form-data needs a boundary in its content-type")
    reader = _FormReader(max_files)
    parser = MultipartParser(boundary, _callbacks(reader))
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"the body is not valid multipart/form-data: {error}") from None
    if not reader.is_complete:
        raise MalformedRequest("the multipart/form-data body ends before its last boundary")
    return _sorted_parts(reader.parts, media_types)


def _callbacks(reader: _FormReader) -> "MultipartCallbacks":
    return {
        "on_part_begin": reader.on_part_begin,
        "on_part_data": reader.on_part_data,
        "on_header_field": reader.on_header_field,
        "on_header_value": reader.on_header_value,
        "on_header_end": reader.on_header_end,
        "on_headers_finished": reader.on_headers_finished,
        "on_end": reader.on_end,
    }


def _sorted_parts(parts: Sequence[Part], media_types: Sequence[str]) -> Form:
    files: list[bytes] = []
    parameters: bytes | None = None
    for part in parts:
        if not part.is_file and part.name == "parameters" and parameters is None:
            parameters = bytes(part.data)
        elif not part.is_file:
            raise MalformedRequest(
                f"the form field {part.name[:60]!r} is no file; send files, and at most one field"
                " `parameters` with JSON",
                param=part.name[:60],
            )
        elif part.media not in ("", "application/octet-stream", *media_types):
            raise unsupported(part.media, media_types)
        else:
            files.append(bytes(part.data))
    return Form(files, parameters)
