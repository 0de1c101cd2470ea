"""Whether two answers are the same, bit for bit, how far apart they are, and copies that nobody writes to.

Owns: the comparisons. Must not know: models, what an answer means. A tolerance would hide slow drift; equal
bits also say that NaN equals NaN.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch


def snapshot(value: Any) -> Any:
    """A copy that shares no memory with `value`."""
    return mapped(value, torch.Tensor.clone, np.copy)


def same(one: Any, other: Any) -> bool:
    """Equal in structure, type, shape, dtype and every bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):  # a snapshot of any mapping is a dict
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return _tensors_same(one, other)
    if isinstance(one, np.ndarray):
        return (
            bool(one.dtype == other.dtype and one.shape == other.shape) and one.tobytes() == other.tobytes()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other or (one != one and other != other)
    if hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return bool(one == other)


def _tensors_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(_bits(one), _bits(other)))


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def mapped(value: Any, on_tensor: Callable[[Any], Any], on_array: Callable[[Any], Any]) -> Any:
    """The same structure with each tensor and numpy array replaced."""
    if isinstance(value, torch.Tensor):
        return on_tensor(value)
    if isinstance(value, np.ndarray):
        return on_array(value)
    if isinstance(value, Mapping):
        return {key: mapped(part, on_tensor, on_array) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, on_tensor, on_array) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, on_tensor, on_array) for part in value)
    return value


def digest(value: Any) -> str:
    """Equal for answers that are `same`, in any process."""
    found = hashlib.sha256()
    for part in _leaves(value):
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode() + _bits(part).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]


def distance(one: Any, other: Any) -> float:
    """Largest difference, relative to the largest number of the same tensor; infinity where answers differ in
    structure, a shape, a string or a whole number."""
    parts, others = list(_leaves(one)), list(_leaves(other))
    if len(parts) != len(others):
        return math.inf
    return max((_apart(a, b) for a, b in zip(parts, others, strict=True)), default=0.0)


def first_difference(one: Any, other: Any) -> tuple[str, str]:
    """The first parts of two answers that differ, as text: four numbers of a tensor from there on."""
    for a, b in zip(_leaves(one), _leaves(other), strict=False):
        if not same(a, b):
            return _shown(a, b)
    return ("", "")


def _shown(one: Any, other: Any) -> tuple[str, str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        one, other = (value.detach().cpu().float().numpy() for value in (one, other))
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.shape == other.shape):
        return (f"{one!r:.80}", f"{other!r:.80}")
    first, second = one.reshape(-1), other.reshape(-1)
    begin = int(np.argmax(first != second))
    where = f"from number {begin + 1} on: " if begin else ""
    texts = [", ".join(f"{value:.4g}" for value in part[begin : begin + 4]) for part in (first, second)]
    return (f"{where}{texts[0]}", f"{where}{texts[1]}")


def _apart(one: Any, other: Any) -> float:
    if type(one) is not type(other):
        return math.inf
    if isinstance(one, np.ndarray):
        if one.dtype.kind not in "fc":
            return 0.0 if np.array_equal(one, other) else math.inf
        one, other = torch.from_numpy(one), torch.from_numpy(other)
    if isinstance(one, torch.Tensor):
        return _tensors_apart(one, other)
    if isinstance(one, float):
        return abs(one - other) / max(1.0, abs(one), abs(other)) if one != other else 0.0
    return 0.0 if one == other else math.inf


def _tensors_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if _tensors_same(one, other):
        return 0.0
    if not one.is_floating_point():
        return math.inf
    a, b = one.detach().double().cpu(), other.detach().double().cpu()
    if not bool((a.isfinite() == b.isfinite()).all()):
        return math.inf
    a, b = a.nan_to_num(), b.nan_to_num()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    return float((a - b).abs().max()) / scale


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key in value:
            yield str(key)
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for part in value:
            yield from _leaves(part)
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type)):
        yield type(value).__name__
        yield from _leaves(vars(value))
    else:
        yield value
