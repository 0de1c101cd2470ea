"""Linear layers with 8-bit weights and 8-bit inputs, a scale for each 32 of an output and of a row.

Owns: the quantised weights' layout, the call into int8.cpp. Must not know: networks. A row's answer depends
on nothing but the row. Source: ggml's Q8_0, groups of 32 on both sides; one scale a row and an output made
SmolLM2 find another best token at 18 of 100 places: single inputs are far larger than the rest. torch's own
products on few rows: 43 ms for SmolLM2's layers on one row in fp32, 22 by onednn.qlinear_pointwise without
the quantisation of inputs.
"""

import ctypes
import enum

import torch

from deployments.runtime.optimise.native import library

_BLOCK, _HALF, _GROUP = 32, 16, 32
"""Outputs of a block of weights; with GATED one half of them is the gate's. Inputs that share a scale."""


class End(enum.IntEnum):
    """What follows the product: nothing, + other, or SiLU(first half of the weights) * second half."""

    PLAIN = 0
    PLUS = 1
    GATED = 2


class _Linear(ctypes.Structure):
    """As `Linear` in int8.cpp."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("floor", ctypes.c_float),
    ]


class Int8Linear:
    """x [T, in] float32 -> [T, out] float32, on a CPU.

    weight [out, in] and bias [out], float32; GATED: [2 * out, in], the gate's rows first. floor: each row is
    divided by sqrt(sum of its squares + floor) before, which costs nothing here (RMSNorm, its weight in
    `weight`). Raises CantOptimise where the kernels can't be built.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        end: End = End.PLAIN,
        floor: float | None = None,
    ) -> None:
        self._kernel = library().brimful_linear
        rows, inputs = weight.shape
        self._outputs = rows // 2 if end == End.GATED else rows
        if end == End.GATED:
            weight = _interleave(weight)
            bias = None if bias is None else _interleave(bias)
        weight = torch.nn.functional.pad(_fill(weight), (0, -inputs % _GROUP))
        blocks = weight.view(-1, _BLOCK, weight.shape[1] // _GROUP, _GROUP)  # [B, 32, groups, 32]
        scales = blocks.abs().amax(3).div_(127)
        tiny = torch.finfo(torch.float32).tiny
        stored = (blocks / scales.clamp_min(tiny).unsqueeze(3)).round_().add_(128).to(torch.uint8)
        # -> [B, groups, 8, 32, 4]: what a group's 8 products of 4 inputs read, one after another
        packed = stored.view(*stored.shape[:3], -1, 4).permute(0, 2, 3, 1, 4).contiguous()
        scales = scales.transpose(1, 2).contiguous()  # [B, groups, 32]
        # The structure holds bare addresses: these keep what is there.
        self._held = (packed, scales, None if bias is None else _fill(bias).contiguous())
        self._linear = _Linear(
            *(None if tensor is None else tensor.data_ptr() for tensor in self._held),
            inputs,
            len(packed),
            self._outputs,
            end,
            -1.0 if floor is None else floor,
        )
        self._address = ctypes.byref(self._linear)

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """other: [T, out], added with End.PLUS."""
        x = x.contiguous()
        out = x.new_empty(len(x), self._outputs)
        self._kernel(
            self._address,
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(len(x)),
            None if other is None else ctypes.c_void_p(other.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out


def _interleave(both: torch.Tensor) -> torch.Tensor:
    """[2 * out, ...] -> [2 * filled out, ...]: 16 rows of the first half, then the same 16 of the second."""
    halves = [_fill(half, _HALF) for half in both.chunk(2)]
    split = [half.view(-1, _HALF, *half.shape[1:]) for half in halves]
    return torch.stack(split, 1).flatten(0, 2)


def _fill(rows: torch.Tensor, multiple: int = _BLOCK) -> torch.Tensor:
    """Zeros added until the rows are a multiple."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
