"""What an instance is made of, as one short text: weights, and what else decides its answers.

Owns: that digest. Must not know: verdicts; audit/identity.py has the code. What is made anew at each load, at
random, gives another digest each time.
"""

import hashlib
from typing import Any

import torch

from deployments.runtime.copies import is_readable
from deployments.runtime.modules import modules_of, tensors_of


def digest_of(model: Any) -> str:
    """Of the values of all its tensors, its modules' kinds and modes and scripted code, as hex; 1 s a GB."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors_of(model), key=lambda found: found[0]):
        _add(state, name, tensor)
    for name, module in modules_of(model):
        state.update(f"{name} {type(module).__qualname__} {module.training}".encode())
        if isinstance(module, torch.jit.ScriptModule):
            state.update(_script_of(module).encode())
        elif not list(module.children()):  # packed weights of quantised layers are no tensors
            for key, value in module.state_dict().items():
                for number, part in enumerate(value if isinstance(value, tuple) else ()):
                    if isinstance(part, torch.Tensor):
                        _add(state, f"{name}.{key}[{number}]", part)
    return state.hexdigest()


def _add(state: Any, name: str, tensor: torch.Tensor) -> None:
    if not is_readable(tensor):
        state.update(f"{name} {type(tensor).__qualname__}".encode())
        return
    state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_quantized:
        state.update(repr(plain.qscheme()).encode())
        plain = plain.dequantize()
    if plain.layout is torch.strided:
        flat = plain.to("cpu").contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy())


def _script_of(module: torch.jit.ScriptModule) -> str:
    try:
        return str(module.code)
    except (AttributeError, RuntimeError):  # no forward of its own
        return ""
