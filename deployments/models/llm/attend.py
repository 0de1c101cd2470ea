"""Attention of single tokens over keys and values in rows, in one call for all sequences of a step.

Owns: the call into int8.cpp and which heads it can take. Must not know: whose memory the rows are, chunks.
Against scaled_dot_product_attention on spans of slots: no padding, no mask, no scattered write before.
"""

import ctypes

import torch

from deployments.models.llm.config import DecoderShape
from deployments.runtime.optimise.native import library

HEAD_SIZES = (16, 32, 64, 128)


class _Shape(ctypes.Structure):
    """As `Attention` in int8.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_size", "capacity")]


class RowKernel:
    """For rows [slots, layers, 2, kv_heads, capacity, D] float32."""

    def __init__(self, rows: torch.Tensor, shape: DecoderShape) -> None:
        self._rows, self._shape = rows, shape
        self._kernel = library().brimful_attend
        self._facts = _Shape(shape.heads, shape.kv_heads, shape.head_dim, rows.shape[-2])

    def step(self, slots: torch.Tensor, positions: torch.Tensor) -> "SingleTokens":
        """For the tokens at `positions` [n] of `slots` [n], both int64."""
        return SingleTokens(self, slots * self._rows.stride(0), positions.contiguous())

    def attend(
        self, layer: int, heads: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """heads [n, heads + 2 * kv_heads, D], rotated: stores keys and values -> mixed [n, heads * D]."""
        out = heads.new_empty(len(heads), self._shape.heads * self._shape.head_dim)
        self._kernel(
            ctypes.byref(self._facts),
            ctypes.c_void_p(self._rows.data_ptr() + layer * self._rows.stride(1) * self._rows.itemsize),
            ctypes.c_void_p(starts.data_ptr()),
            ctypes.c_void_p(positions.data_ptr()),
            ctypes.c_void_p(heads.data_ptr()),
            ctypes.c_int64(len(heads)),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out


class SingleTokens:
    """The single tokens of one step, for all layers."""

    def __init__(self, kernel: RowKernel, starts: torch.Tensor, positions: torch.Tensor) -> None:
        self._kernel, self._starts, self._positions = kernel, starts, positions

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        return self._kernel.attend(layer, heads, self._starts, self._positions)
