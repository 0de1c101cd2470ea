"""Items as callers send them: JSON values and numpy arrays to tensors, and their shapes.

Owns: reading nested lists, the default `preprocess`, the shape check. Must not know: model classes,
batches, HTTP. Every refusal is an InvalidItem whose text says what was expected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deployments.core.contract import TensorSpec
from deployments.core.errors import InvalidItem
from deployments.runtime.datatypes import NUMPY_TYPES


def read_array(value: Any, datatype: str = "FP32") -> np.ndarray[Any, Any]:
    """Turn a number or a nested list of numbers into an array of the protocol's `datatype`.

    Raises InvalidItem for anything else: strings, null, booleans (except for BOOL), ragged or deeper
    than numpy's 64 dimensions, or numbers that the datatype can't hold.
    """
    wanted = NUMPY_TYPES.get(datatype)
    if wanted is None or isinstance(value, (str, bytes, Mapping)) or value is None:
        raise InvalidItem(f"expected a number or a nested list of numbers, got {name_of(value)}")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InvalidItem("the nested list is ragged or too deep: rows differ in length") from error
    if wanted is not np.bool_ and holds_bool(value):  # numpy reads [1, true] as [1, 1]
        raise InvalidItem("expected numbers only, got booleans")
    is_bool, wants_bool = array.dtype.kind == "b", wanted is np.bool_
    if array.dtype.kind not in "biuf" or is_bool != wants_bool:
        raise InvalidItem(
            f"expected {'booleans' if wants_bool else 'numbers only'}, got {_first_wrong(array)}"
        )
    return _cast(array, np.dtype(wanted))


def holds_bool(value: Any) -> bool:
    """True if a nested list, not too deep, holds a boolean; a third of what np.asarray takes."""
    if not isinstance(value, (list, tuple)):
        return isinstance(value, bool)
    kinds = set(map(type, value))
    if bool in kinds:
        return True
    return not kinds.isdisjoint((list, tuple)) and any(map(holds_bool, value))


def _cast(array: np.ndarray[Any, Any], wanted: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if array.dtype != wanted:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(cast, array):
            raise InvalidItem(f"expected whole numbers that fit {wanted.name}")
        array = cast
    if wanted.kind == "f" and not np.isfinite(array).all():
        raise InvalidItem(f"a number is NaN, infinite, or too large for {wanted.name}")
    return array


def _first_wrong(array: np.ndarray[Any, Any]) -> str:
    kinds = {"b": "booleans", "U": "a string", "S": "a string"}
    if array.dtype.kind != "O":
        return kinds.get(array.dtype.kind, str(array.dtype))
    wrong = next((v for v in array.flat if not isinstance(v, (int, float))), "a number too large")
    return wrong if wrong == "a number too large" else name_of(wrong)


def name_of(value: Any) -> str:
    names = {str: "a string", bytes: "raw bytes", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def read_example(item: Any, inputs: Sequence[TensorSpec]) -> Any:
    """The default `preprocess`: one tensor, or with several inputs a dict of them, one per name."""
    if len(inputs) == 1:
        return torch.from_numpy(read_array(item, inputs[0].datatype))
    names = {spec.name for spec in inputs}
    if not isinstance(item, Mapping) or set(item) != names:
        raise InvalidItem(f"expected an object with exactly the keys {sorted(names)}")
    return {spec.name: torch.from_numpy(read_array(item[spec.name], spec.datatype)) for spec in inputs}


def plain_json(item: Any) -> Any:
    """What a user's own `preprocess` gets: numpy's arrays and scalars as JSON's, all else as it is."""
    if isinstance(item, (np.ndarray, np.generic)):
        return item.tolist()
    if isinstance(item, dict):
        return {key: plain_json(value) for key, value in item.items()}
    if isinstance(item, list) and any(isinstance(part, (np.ndarray, np.generic)) for part in item):
        return [plain_json(part) for part in item]
    return item


def shape_of_list(value: Any) -> tuple[int, ...]:
    """Lengths along the first elements of a nested list; () for a number. Bounded at 64 deep."""
    if isinstance(value, np.ndarray):
        return tuple(value.shape)
    shape: list[int] = []
    while isinstance(value, (list, tuple)) and len(shape) < 64:
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def check_dims(found: Sequence[int], wanted: Sequence[int], name: str = "") -> None:
    """Raise InvalidItem where one item's shape contradicts `wanted` (-1 takes any)."""
    if len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True)):
        return
    where = f" for {name!r}" if name else ""
    raise InvalidItem(f"expected shape {show_dims(wanted)}{where}, got {show_dims(found)}")


def show_dims(dims: Sequence[int]) -> str:
    return "[" + ", ".join("any" if dim == -1 else str(dim) for dim in dims) + "]"


def common_dims(
    examples: Sequence[Any],
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """One shape for all, -1 where they differ; None where their ranks do or there are none."""
    if examples and all(isinstance(e, Mapping) for e in examples):
        shared = set(examples[0]).intersection(*examples)
        named = {name: common_dims([e[name] for e in examples]) for name in shared}
        return {name: dims for name, dims in named.items() if isinstance(dims, tuple)}
    if not examples or not all(hasattr(e, "shape") for e in examples):
        return None
    shapes = [tuple(e.shape) for e in examples]
    if len({len(shape) for shape in shapes}) > 1:
        return None
    return tuple(dims[0] if len(set(dims)) == 1 else -1 for dims in zip(*shapes, strict=True))
