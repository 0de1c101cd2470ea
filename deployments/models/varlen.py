"""PyTorch's variable-length attention, imported where a GPU first needs it.

Owns: that import. Must not know: networks. It brings torch's compiler along, 2 s at start-up, of which a CPU
has nothing. Source: torch.nn.attention.varlen.
"""

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """`varlen_attn`; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
