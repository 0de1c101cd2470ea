"""Variants by the type of number: bf16 and fp16 throughout.

Owns: converting modules and the tensors that enter and leave them. Must not know: whether it is faster here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deployments.runtime.optimise.found import outermost
from deployments.runtime.tensors import map_tensors


def to_bf16(instance: Any, calls: Sequence[Callable[[], Any]]) -> None:
    """Every module in bfloat16; floats are converted where they enter and leave."""
    _convert(instance, torch.bfloat16)


def to_fp16(instance: Any, calls: Sequence[Callable[[], Any]]) -> None:
    """Every module in float16; floats are converted where they enter and leave."""
    _convert(instance, torch.float16)


def _convert(instance: Any, dtype: torch.dtype) -> None:
    def enter(module: Any, args: Any, kwargs: Any) -> Any:
        return _floats_to(args, dtype), _floats_to(kwargs, dtype)

    def leave(module: Any, args: Any, output: Any) -> Any:
        return _floats_to(output, torch.float32)

    for module in outermost(instance):
        module.to(dtype)
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)


def _floats_to(value: Any, dtype: torch.dtype) -> Any:
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
