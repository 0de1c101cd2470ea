"""What a call writes that outlives it, and in which line: attributes, class attributes, globals, caches.

Owns: looking at the state around each line of the model's own code. Must not know: threads, whether a write
does harm: 8 safe models of DESIGN's 39 write, and 5 of 9 unsafe ones show no write. It tells where to look.
"""

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from deployments.audit.instruments import is_own

SMALL = 4096
"""Elements of a tensor whose values are looked at, where it counts no versions (made in inference mode)."""
MAX_SEEN = 200
"""Attributes of an object, globals of a file: more are not looked at."""


@dataclass(frozen=True, slots=True)
class Write:
    """attribute: as "self.cache" of the class `owner`, or a global's name. line: of `file`, 1-based."""

    attribute: str
    owner: str
    file: str
    line: int

    def as_json(self) -> dict[str, Any]:
        return {"attribute": self.attribute, "of": self.owner, "file": self.file, "line": self.line}


def writes_of(call: Callable[[], Any]) -> list[Write]:
    """Make the call in this thread; its writes, each once, in the order of the lines."""
    watcher = _Watcher()
    before = sys.gettrace()
    sys.settrace(watcher.on_call)
    try:
        call()
    finally:
        sys.settrace(before)
    return list(watcher.found)


class _Watcher:
    def __init__(self) -> None:
        self.found: dict[Write, None] = {}
        self._last: dict[int, tuple[int, dict[Any, Any]]] = {}  # id(frame) -> (its line, what was seen)
        self._told: dict[Any, Any] = {}  # what a called frame told of already

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not is_own(frame.f_code.co_filename):
            return None
        self._last[id(frame)] = (frame.f_lineno, _seen(frame))
        return self._on_line

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event in ("line", "return"):
            line, before = self._last.get(id(frame), (frame.f_lineno, {}))
            after = _seen(frame)
            for name, mark in after.items():
                is_new = before.get(name, mark) != mark or (name not in before and before)
                if is_new and self._told.get(name) != mark:
                    attribute, owner, _ = name
                    self._told[name] = mark
                    self.found[Write(attribute, owner, frame.f_code.co_filename, line)] = None
            self._last[id(frame)] = (frame.f_lineno, after)
            if event == "return":
                del self._last[id(frame)]
        return self._on_line


def _seen(frame: FrameType) -> dict[tuple[str, str, int], Any]:
    """(name, owner, the owner's id) -> a mark that changes when the value is set or changed in place."""
    seen: dict[tuple[str, str, int], Any] = {}
    me = frame.f_locals.get("self")
    if me is not None:
        owner = type(me).__name__
        for name, value in _attributes(me):
            seen[f"self.{name}", owner, id(me)] = _mark(value)
        for kind in type(me).__mro__[:4]:
            if is_own(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<none>"):
                for name, value in list(vars(kind).items())[:MAX_SEEN]:
                    if not name.startswith("__") and not _is_fixed(value):
                        seen[f"{kind.__name__}.{name}", "class", id(kind)] = _mark(value)
    for name, value in list(frame.f_globals.items())[:MAX_SEEN]:
        if not name.startswith("__") and not _is_fixed(value):
            seen[name, "global", id(frame.f_globals)] = _mark(value)
    return seen


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for name, part in list(getattr(value, "__dict__", {}).items())[:MAX_SEEN]:
        if name in ("_parameters", "_buffers", "_modules") and isinstance(part, dict):
            yield from part.items()
        elif not name.startswith("_backward") and not name.startswith("_forward"):
            yield name, part


_FIXED = (
    type,
    types.FunctionType,
    types.ModuleType,
    types.BuiltinFunctionType,
    staticmethod,
    classmethod,
    property,
)


def _is_fixed(value: Any) -> bool:
    return isinstance(value, _FIXED) and _cache_of(value) is None


def _cache_of(value: Any) -> Any:
    """An lru_cache, bare or as a static method."""
    function = getattr(value, "__func__", value)
    return function if hasattr(function, "cache_info") else None


def _mark(value: Any, depth: int = 2) -> Any:
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return value if value == value else "NaN"  # which differs from itself
    if isinstance(value, torch.Tensor):
        return (id(value), _version(value))
    cache = _cache_of(value)
    if cache is not None:
        return cache.cache_info()[2:]
    if isinstance(value, Mapping) and depth:
        return (id(value), len(value), *(_mark(part, depth - 1) for part in list(value.values())[:16]))
    if isinstance(value, (list, tuple, set)) and depth:
        return (id(value), len(value), *(_mark(part, depth - 1) for part in list(value)[:16]))
    if isinstance(value, (list, Mapping, set)):
        return (id(value), len(value))
    return id(value)


def _version(tensor: torch.Tensor) -> Any:
    if not tensor.is_inference():
        return tensor._version
    if tensor.numel() > SMALL or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return 0
    return hash(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
