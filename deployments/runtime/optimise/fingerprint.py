"""What a compiled module was made from, as a name: its weights and code, torch, the CPU, shapes.

Owns: that name. Must not know: compilers, folders.
"""

import hashlib
import inspect
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def fingerprint(module: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> str:
    """Hex digits that change with anything that a compiled form of the module depends on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.layout is torch.strided:
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    for kind in sorted({type(part) for part in module.modules()}, key=lambda one: one.__qualname__):
        digest.update(f"{kind.__module__}.{kind.__qualname__}\n{_source(kind)}".encode())
    digest.update(repr(module).encode())  # settings of layers: strides, groups
    shapes = [[(tuple(one.shape), str(one.dtype), str(one.device)) for one in args] for args in inputs]
    digest.update(f"{shapes} {torch.__version__} {_machine(inputs[0][0].device)}".encode())
    return digest.hexdigest()[:24]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
