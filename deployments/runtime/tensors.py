"""Batches of tensors and what becomes of their outputs: defaults of a model's optional methods.

Owns: stacking, cutting, moving, finiteness, outputs as JSON or arrays. Must not know: model classes,
threads, HTTP. Every refusal is a ModelBroken; what callers send is read in items.py.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deployments.core.contract import TensorSpec
from deployments.core.errors import ModelBroken
from deployments.runtime.datatypes import NUMPY_TYPES
from deployments.runtime.items import name_of


class NonFinite:
    """Stands for an output that held NaN or Infinity; found once per batch, raised per item."""


NON_FINITE = NonFinite()


# Batches


def key_of(example: Any) -> Hashable:
    """Examples with equal keys can be stacked: shapes, dtypes, dict keys, all the way down."""
    if isinstance(example, (torch.Tensor, np.ndarray)):
        return (tuple(example.shape), example.dtype)
    if isinstance(example, Mapping):
        return tuple((name, key_of(example[name])) for name in sorted(example))
    if isinstance(example, (tuple, list)):
        return tuple(key_of(part) for part in example)
    return type(example).__qualname__


def stack(examples: Sequence[Any]) -> Any:
    """The default `collate`: n examples of one key -> the same structure with a first dim of n."""
    first = examples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(list(examples))
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(examples))
    if isinstance(first, Mapping):
        return {name: stack([e[name] for e in examples]) for name in first}
    if isinstance(first, (tuple, list)):
        return tuple(stack(parts) for parts in zip(*examples, strict=True))
    if isinstance(first, (bool, int, float)):
        return torch.tensor(list(examples))
    raise ModelBroken(
        f"preprocess returned a {type(first).__name__}, which can't be stacked: "
        "the model class needs its own collate"
    )


def cut(outputs: Any, n: int) -> list[Any]:
    """The default `split`: along dimension 0, through tuples and dicts; a list is taken as cut.

    Raises ModelBroken where there are not n.
    """
    if isinstance(outputs, Mapping):
        parts = {name: cut(part, n) for name, part in outputs.items() if part is not None}
        if not parts:
            raise ModelBroken(f"forward returned an empty dict for a batch of {n}")
        return [{name: part[i] for name, part in parts.items()} for i in range(n)]
    if isinstance(outputs, tuple):
        columns = [cut(part, n) for part in outputs if part is not None]
        if not columns:
            raise ModelBroken(f"forward returned an empty tuple for a batch of {n}")
        return list(zip(*columns, strict=True))
    if isinstance(outputs, (torch.Tensor, np.ndarray)):
        check_count(len(outputs) if outputs.ndim else None, n)
        return list(outputs)
    if isinstance(outputs, list):
        check_count(len(outputs), n)
        return outputs
    raise ModelBroken(f"forward returned {name_of(outputs)}, which can't be split for a batch of {n}")


def check_count(count: int | None, n: int) -> None:
    """Raise ModelBroken unless there is one output for each of n items."""
    if count is None:
        raise ModelBroken(f"forward returned a single number for a batch of {n}")
    if count != n:
        raise ModelBroken(f"forward returned {count} outputs for a batch of {n}")


def map_tensors(value: Any, change: Any) -> Any:
    """The same structure of tuples, lists and dicts with `change` applied to each tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(part, change) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_tensors(part, change) for part in value]
    return value


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, detached, in a dtype that numpy has."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def is_finite(value: Any) -> bool:
    """False if any float tensor in the structure holds NaN or Infinity."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind != "f" or bool(np.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(is_finite(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return all(is_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def elements(value: Any) -> list[int]:
    """Number of elements of each tensor in the structure, in order."""
    counts: list[int] = []
    map_tensors(value, lambda tensor: counts.append(tensor.numel()))
    return counts


# Outputs


def to_json(value: Any) -> Any:
    """The default `postprocess`, and the check of a user's own: a finite JSON value.

    Tensors and arrays become lists. Raises ModelBroken on NaN, Infinity or what JSON can't hold.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if not is_finite(value):
            raise ModelBroken("output holds NaN or Infinity")
        return value.tolist()
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ModelBroken("output holds NaN or Infinity")
        return float(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        if _all_finite_floats(value):
            return list(value)
        return [to_json(part) for part in value]
    if isinstance(value, Mapping):
        return {_json_key(key): to_json(part) for key, part in value.items()}
    if isinstance(value, np.generic):
        return to_json(value.item())
    raise ModelBroken(f"output holds a {type(value).__name__}, which JSON can't")


def _all_finite_floats(values: Sequence[Any]) -> bool:
    # 384 floats: 9 us, against 45 us one by one; a sum that overflows only takes the slow path.
    return set(map(type, values)) == {float} and math.isfinite(sum(values))


def _json_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ModelBroken(f"output has a {type(key).__name__} as a key, which JSON can't")
    return key


def to_named_arrays(value: Any, outputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The default `to_tensors`: one output's parts by the declared names, as the protocol's arrays.

    BYTES become lists of str. Raises ModelBroken where the value doesn't fit the declaration.
    """
    if len(outputs) == 1 and not (isinstance(value, Mapping) and set(value) == {outputs[0].name}):
        parts: Sequence[Any] = [value]
    elif isinstance(value, Mapping) and all(spec.name in value for spec in outputs):
        parts = [value[spec.name] for spec in outputs]
    elif isinstance(value, (tuple, list)) and len(value) == len(outputs):
        parts = value
    else:
        names = [spec.name for spec in outputs]
        raise ModelBroken(f"the model's output doesn't hold the declared outputs {names}")
    return {spec.name: _as_datatype(part, spec) for spec, part in zip(outputs, parts, strict=True)}


def _as_datatype(part: Any, spec: TensorSpec) -> Any:
    if isinstance(part, torch.Tensor):
        part = to_cpu(part).numpy()
    if spec.datatype == "BYTES":
        return _as_strings(part, spec)
    try:
        return np.asarray(part, dtype=NUMPY_TYPES[spec.datatype])
    except (ValueError, TypeError) as error:
        raise ModelBroken(f"output {spec.name!r} is not a {spec.datatype} tensor") from error


def _as_strings(part: Any, spec: TensorSpec) -> Any:
    """One item's strings; where the only dimension counts the items, the one string itself."""
    if isinstance(part, np.ndarray):
        part = part.tolist()
    strings = [part] if isinstance(part, (str, bytes)) else list(part)
    return strings[0] if len(spec.shape) == 1 and len(strings) == 1 else strings
