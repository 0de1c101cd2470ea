"""A second instance whose weights are the first's: what a pool of copies is made of.

Owns: which tensors copies share, and noticing that one of them is written after all. Must not know: who uses
a copy when, audits. What the first instance never writes is shared, parameters and plain tensors alike; a
module's buffers, what was written since the load and all Python state stay the copy's own.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from deployments.runtime.modules import modules_of, tensors_of


class Weights:
    """The tensors of an instance as they were when it had just been loaded: make it before its first call."""

    def __init__(self, first: Any) -> None:
        buffers = _buffers_of(first)
        self._tensors = {name: (tensor, version_of(tensor)) for name, tensor in tensors_of(first)}
        self._own = {
            name: tensor.detach().clone()
            for name, (tensor, _) in self._tensors.items()
            if id(tensor) in buffers
        }

    def tie(self, copy: Any) -> "Tied":
        """Let a freshly loaded `copy` share what may be shared, and begin with the first's other values."""
        shared = []
        with torch.no_grad():
            for name, tensor in tensors_of(copy):
                known = self._tensors.get(name)
                if known is None or not _are_alike(tensor, known[0]):
                    continue
                first, version = known
                if name in self._own:
                    tensor.copy_(self._own[name])
                elif version is not None and version_of(first) == version:
                    # Its own tensor object over the first's memory: containers stay as they are.
                    tensor.data = first.data
                    if tensor._base is not None:  # or what it was a view of would stay
                        tensor._base.data = tensor.new_empty(0)
                    shared.append(tensor)
        return Tied(shared)


class Tied:
    """The tensors of a copy that lie in the first instance's memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._versions = self._sum()
        self.bytes = sum(_bytes_of(tensor) for tensor in tensors)

    def _sum(self) -> int:
        return sum(tensor._version for tensor in self._tensors)

    @property
    def is_written(self) -> bool:
        """Whether a call wrote to what is shared; 10 us for 200 tensors."""
        return self._sum() != self._versions


def version_of(tensor: torch.Tensor) -> int | None:
    """Grows with each write in place; None for tensors made in inference mode, which count nothing."""
    return None if tensor.is_inference() else tensor._version


def digest_of(model: Any) -> str:
    """Of the values of all its tensors, as hex; 1 s a GB."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors_of(model), key=lambda found: found[0]):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized:
            plain = tensor.detach().to("cpu").contiguous()
            state.update(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return state.hexdigest()


def _buffers_of(model: Any) -> set[int]:
    return {id(buffer) for _, module in modules_of(model) for buffer in module.buffers(recurse=False)}


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.layout, one.device) == (
        other.shape,
        other.dtype,
        other.layout,
        other.device,
    )


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
