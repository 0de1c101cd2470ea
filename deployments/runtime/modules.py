"""Finds the torch modules and tensors that a model's instance holds, wherever it keeps them.

Owns: the walk. Must not know: what is asked of a module or a tensor.
"""

import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

MAX_OBJECTS = 100_000
"""Looked at, nearest first: 0.1 s. A model reaches more only through a library's own registries."""

_LEAVES = (
    bool, int, float, complex, str, bytes, type(None), type,
    types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip


def modules_of(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every module, nearest first, each once: ("self.nets[1]", Dropout)."""
    return ((name, value) for name, value in _objects_of(model) if isinstance(value, torch.nn.Module))


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor, parameters and buffers included, nearest first, each once."""
    return ((name, value) for name, value in _objects_of(model) if isinstance(value, torch.Tensor))


def _objects_of(model: Any) -> Iterator[tuple[str, Any]]:
    waiting: deque[tuple[str, Any]] = deque([("self", model)])
    seen: set[int] = {id(model)}
    while waiting:
        name, value = waiting.popleft()
        yield name, value
        if isinstance(value, torch.Tensor):
            continue
        for suffix, part in parts_of(value):
            if isinstance(part, _LEAVES) or id(part) in seen:
                continue
            if len(seen) >= MAX_OBJECTS:
                return
            seen.add(id(part))
            waiting.append((name + suffix, part))


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """(suffix, part) of what a value holds itself: entries, submodules, attributes."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    if isinstance(value, torch.nn.Module):
        yield from ((f".{name}", part) for name, part in value.named_children())
    if isinstance(value, torch.jit.ScriptModule):  # it keeps them in C++
        yield from ((f".{name}", part) for name, part in value.named_parameters(recurse=False))
        yield from ((f".{name}", part) for name, part in value.named_buffers(recurse=False))
    # Not dir() and getattr: a property would run the model's code.
    attributes = getattr(value, "__dict__", {})
    names = {} if isinstance(value, torch.nn.Module) else _slots_of(value)
    yield from ((f".{name}", part) for name, part in {**names, **attributes}.items() if name != "_modules")


def _slots_of(value: Any) -> dict[str, Any]:
    found = {}
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:  # not set
                    continue
    return found
