"""Tensors of the Open Inference Protocol: JSON data or raw bytes to numpy and back.

Owns: the datatypes, the size and type checks, the binary layout. Must not know: requests, models.

Raw layout as in Triton's binary tensor data extension: little-endian, row-major, no padding; BOOL one
byte, 0 or 1; BYTES a 4-byte length before each element. BF16 has no numpy type: in the server it is
float32, on the wire raw only (JSON has no way to say which 16 bits are meant).
"""

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.core.errors import InvalidItem, MalformedRequest, ModelBroken

Array = npt.NDArray[Any]
Rows = Array | list[Any]
"""One entry an item: an array's rows, or elements of BYTES (nested where the shape says so)."""

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"),
}
"""Datatype to what it is inside the server; BYTES is a list of str or bytes."""

DATATYPES = (*NUMPY, "BYTES")
MAX_RANK = 32
_BF16_NAN = 0x7FC0


@dataclass(frozen=True, slots=True)
class Header:
    """What a request says of one of its tensors, checked against what the model declares.

    as_bytes: BYTES elements stay bytes (encoded media); otherwise they are UTF-8 text.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    as_bytes: bool = False

    @property
    def count(self) -> int:
        """Elements; a Python int, so no product of dimensions is too big to compare."""
        return math.prod(self.shape)

    def refuse(self, why: str) -> MalformedRequest:
        return MalformedRequest(f"input '{self.name}': {why}", param=self.name)


# JSON -> rows


def rows_from_json(header: Header, data: object) -> Rows:
    """The rows along dimension 0 of `data`, nested like the shape or flat in row-major order."""
    flat = _flatten(header, data)
    if header.datatype == "BYTES":
        return _element_rows(header, [_element_from_json(header, v) for v in flat])
    if header.datatype == "BF16":
        raise header.refuse("BF16 has no JSON form; send it as binary data")
    return _reshaped(header, _numbers(header, flat))


def _flatten(header: Header, data: object) -> list[Any]:
    if type(data) is not list:
        raise header.refuse("`data` must be an array")
    flat: list[Any] = data
    if flat and type(flat[0]) is list:
        _check_length(header, len(flat), header.shape[0])
        for dim in header.shape[1:]:
            if not all(type(row) is list and len(row) == dim for row in flat):
                raise header.refuse(f"`data` is not nested as its shape {list(header.shape)} says")
            flat = list(chain.from_iterable(flat))
    _check_length(header, len(flat), header.count)
    return flat


def _check_length(header: Header, count: int, expected: int) -> None:
    if count != expected:
        raise header.refuse(f"`data` has {count} elements, but shape {list(header.shape)} needs {expected}")


def _numbers(header: Header, flat: list[Any]) -> Array:
    dtype = NUMPY[header.datatype]
    allowed: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    found = set(map(type, flat)) - allowed.get(dtype.kind, {int})
    if found:
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise header.refuse(f"`data` holds {names}, which {header.datatype} can't be")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=dtype)
    except OverflowError:
        raise header.refuse(f"a number is out of the range of {header.datatype}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():  # JSON has no infinity: it overflowed
        raise header.refuse(f"a number is out of the range of {header.datatype}")
    return array


def _element_from_json(header: Header, value: object) -> str | bytes:
    if type(value) is not str:
        raise header.refuse("elements of BYTES must be strings in JSON")
    if not header.as_bytes:
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise header.refuse("elements must be base64 in JSON, or send them as binary data") from None


# Raw bytes -> rows


def rows_from_raw(header: Header, raw: memoryview) -> Rows:
    """The rows along dimension 0 of a binary tensor; its length must be exactly right."""
    if header.datatype == "BYTES":
        return _element_rows(header, _elements_from_raw(header, raw))
    dtype = np.dtype("<u2") if header.datatype == "BF16" else NUMPY[header.datatype]
    expected = header.count * dtype.itemsize
    if len(raw) != expected:
        raise header.refuse(
            f"binary_data_size is {len(raw)}, but {header.datatype} {list(header.shape)}"
            f" needs {expected} bytes"
        )
    if header.datatype == "BOOL" and (np.frombuffer(raw, dtype="u1") > 1).any():
        raise header.refuse("a BOOL is one byte, 0 or 1")
    array: Array = np.frombuffer(raw, dtype=dtype).copy()  # writable: torch warns of others
    if header.datatype == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    return _reshaped(header, array)


def _elements_from_raw(header: Header, raw: memoryview) -> list[str | bytes]:
    """4-byte length, then that many bytes, for each element; nothing may be left over."""
    elements: list[str | bytes] = []
    at = 0
    while at < len(raw):
        if len(elements) == header.count or at + 4 > len(raw):
            raise header.refuse(f"its binary data does not hold {header.count} BYTES elements")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise header.refuse(f"element {len(elements)} is longer than the binary data left")
        elements.append(_element_from_raw(header, bytes(raw[at : at + length])))
        at += length
    _check_length(header, len(elements), header.count)
    return elements


def _element_from_raw(header: Header, element: bytes) -> str | bytes:
    if header.as_bytes:
        return element
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise header.refuse("an element is not valid UTF-8") from None


def _reshaped(header: Header, array: Array) -> Array:
    return array.reshape(header.shape)


def _element_rows(header: Header, flat: list[str | bytes]) -> list[Any]:
    """One element a row for shape [n]; nested lists for more dimensions."""
    if len(header.shape) == 1:
        return flat
    rows: list[Any] = flat
    for dim in reversed(header.shape[1:]):
        rows = [rows[i : i + dim] for i in range(0, len(rows), dim)]
    return rows


# Values -> wire


@dataclass(frozen=True, slots=True)
class Output:
    """One output of all items together. flat: numbers as an array [shape], BYTES as a flat list."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    flat: Array | list[str | bytes]

    def only_item(self) -> "Output":
        """Without dimension 0, which is 1."""
        flat = self.flat[0] if isinstance(self.flat, np.ndarray) else self.flat
        return Output(self.name, self.datatype, self.shape[1:], flat)


def stack_output(name: str, datatype: str, values: Sequence[Any]) -> Output:
    """Items' values of one output as one tensor with dimension 0 for the items.

    Raises InvalidItem where the items' shapes differ, ModelBroken where a value is no such tensor.
    """
    try:
        if datatype == "BYTES":
            arrays = [np.array(value, dtype=object) for value in values]
        else:
            arrays = [np.asarray(value, dtype=NUMPY[datatype]) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        broken = ModelBroken(f"the model's output {name!r} is no {datatype} tensor")
        raise broken from error
    if len({array.shape for array in arrays}) > 1:
        raise InvalidItem(
            f"output {name!r} differs in shape between the items, so one tensor can't hold it;"
            " send one item in a request"
        )
    stacked = np.stack(arrays)
    flat = stacked.ravel().tolist() if datatype == "BYTES" else stacked
    return Output(name, datatype, stacked.shape, flat)


def to_json(output: Output) -> list[Any]:
    """Flat, row-major; BYTES that are no UTF-8 in base64."""
    if isinstance(output.flat, np.ndarray):
        numbers: list[Any] = output.flat.ravel().tolist()
        return numbers
    return [_text(element) for element in output.flat]


def _text(element: str | bytes) -> str:
    if isinstance(element, str):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError:
        return base64.b64encode(element).decode()


def to_raw(output: Output) -> bytes:
    if isinstance(output.flat, np.ndarray):
        if output.datatype == "BF16":
            return _to_bf16(output.flat).tobytes()
        return output.flat.tobytes()
    parts: list[bytes] = []
    for element in output.flat:
        data = element.encode() if isinstance(element, str) else bytes(element)
        parts += (struct.pack("<I", len(data)), data)
    return b"".join(parts)


def _to_bf16(array: Array) -> Array:
    """The upper half of each float32, rounded to nearest even; NaN stays NaN."""
    bits = array.view("<u4")
    # 0x7FFF plus the lowest kept bit: just under a half rounds down, a tie goes to the even side.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result: Array = np.where(np.isnan(array), _BF16_NAN, rounded).astype("<u2")
    return result
