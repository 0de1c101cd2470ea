"""A second instance whose weights are the first's: what a pool of copies is made of.

Owns: which tensors copies share, and noticing that one of them is written after all. Must not know: who uses
a copy when, audits. What the first instance never writes is shared, parameters and plain tensors alike; a
module's buffers, what was written since the load and all Python state stay the copy's own. Writes through
`.data` or numpy are counted by no tensor, and so not noticed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deployments.runtime.modules import modules_of, tensors_of

Address = tuple[str, int]


class Weights:
    """The tensors of an instance as they were when it had just been loaded: make it before its first call."""

    def __init__(self, first: Any) -> None:
        own = _own_memory(first)
        self._shareable: dict[str, tuple[torch.Tensor, int]] = {}
        self._values: dict[str, torch.Tensor] = {}
        for name, tensor in tensors_of(first):
            if not is_readable(tensor):
                continue
            if _memory_of(tensor) in own:
                self._values[name] = tensor.detach().clone()
            elif (version := version_of(tensor)) is not None:
                self._shareable[name] = (tensor, version)

    def tie(self, copy: Any) -> "Tied":
        """Let a freshly loaded `copy` share what may be shared, and begin with the first's other values."""
        own = _own_memory(copy)
        held = {id(tensor) for _, tensor in tensors_of(copy)}
        shared = []
        with torch.no_grad():
            for name, tensor in list(tensors_of(copy)):
                if not is_readable(tensor):
                    continue
                value, known = self._values.get(name), self._shareable.get(name)
                if value is not None and _are_alike(tensor, value):
                    tensor.copy_(value)
                elif known is not None and self._may_share(tensor, known, own):
                    base = tensor._base
                    # Its own tensor object over the first's memory: containers stay as they are.
                    tensor.data = known[0].data
                    if base is not None and id(base) not in held:  # or what it was a view of would stay
                        base.data = tensor.new_empty(0)
                    shared.append(tensor)
        return Tied(shared)

    @staticmethod
    def _may_share(tensor: torch.Tensor, known: tuple[torch.Tensor, int], own: set[Address]) -> bool:
        first, version = known
        return _are_alike(tensor, first) and version_of(first) == version and _memory_of(tensor) not in own

    def watch(self) -> "Tied":
        """The first instance's own side of what copies share."""
        return Tied([tensor for tensor, version in self._shareable.values() if version_of(tensor) == version])


class Tied:
    """The tensors of an instance that lie in memory which others share."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._versions = self._sum()
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _sum(self) -> int:
        return sum(tensor._version for tensor in self._tensors)

    @property
    def is_written(self) -> bool:
        """Whether a call wrote to what is shared; 10 us for 200 tensors."""
        return self._sum() != self._versions


def version_of(tensor: torch.Tensor) -> int | None:
    """Grows with each write in place; None for tensors made in inference mode, which count nothing."""
    return None if tensor.is_inference() else tensor._version


def is_readable(tensor: torch.Tensor) -> bool:
    """False for what has no values yet (lazy layers, meta tensors), or not as one block (nested, sparse)."""
    if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        return False
    return not (tensor.is_meta or tensor.is_nested or tensor.is_sparse or tensor.layout == torch.sparse_csr)


def _own_memory(model: Any) -> set[Address]:
    """Where the buffers of its modules lie: a view of a buffer is as much its own as the buffer."""
    buffers: Iterable[torch.Tensor] = (
        buffer for _, module in modules_of(model) for buffer in module.buffers(recurse=False)
    )
    return {_memory_of(buffer) for buffer in buffers if is_readable(buffer)}


def _memory_of(tensor: torch.Tensor) -> Address:
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # opaque: oneDNN's packed weights
        return "opaque", id(tensor)


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.layout, one.device, one.stride() if _has_strides(one) else ()) == (
        other.shape,
        other.dtype,
        other.layout,
        other.device,
        other.stride() if _has_strides(other) else (),
    )


def _has_strides(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided
