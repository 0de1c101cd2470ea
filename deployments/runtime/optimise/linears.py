"""What stands in for an nn.Linear: packed for oneDNN, in 8 or 4 bits.

Owns: these layers and which weights each can take. Must not know: models, whether it is faster here. All are
modules with tensors of their own, so that copies of an instance can share them. `weight` gives the real
numbers back to code that reads it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from deployments.runtime.optimise.found import CantOptimise, layers, replace

GROUP = 32
"""Neighbouring inputs that share a scale of 4-bit weights."""


def _need_cpu(weight: torch.Tensor) -> None:
    if weight.device.type != "cpu":
        raise CantOptimise("its products are oneDNN's and need a CPU")


class PackedLinear(torch.nn.Module):
    """fp32 weights in oneDNN's layout, bias fused."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        _need_cpu(linear.weight)
        if linear.weight.dtype != torch.float32:
            raise CantOptimise(f"its weights are {linear.weight.dtype}, not float32")
        self.bias = linear.bias
        self._shape = linear.weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 2048)

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._packed.to_dense().view(self._shape)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        y: torch.Tensor = product(x, self._packed, self.bias, "none", [], "")
        return y


class _Rounded(torch.nn.Module):
    """8-bit weights [out, in] with a scale for each output."""

    rounded: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        self.bias = linear.bias
        self.register_buffer("rounded", (weight / scales[:, None]).round_().to(torch.int8))
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> torch.Tensor:
        return self.rounded * self.scales[:, None]


class Int8Weights(_Rounded):
    """Products in the activations' own type; a quarter of the memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch's own product of 8-bit weights is ten times slower than this for float32 on a CPU.
        y = F.linear(x, self.rounded.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Linear(torch.nn.Module):
    """8-bit weights and inputs, a scale for each row of the inputs: batch-mates don't meet.

    Row: the last dimension, one token. 128 stands for 0: oneDNN's fast products take inputs without a sign.
    """

    _ZERO = 128
    bias: torch.Tensor
    _shift: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        _need_cpu(linear.weight)
        _need_vnni()
        rounded = _Rounded(linear)
        self.register_buffer("_scales", rounded.scales)
        self.register_buffer("_zeros", torch.zeros(len(rounded.scales), dtype=torch.int32))
        self.register_buffer("_shift", torch.full((linear.in_features,), float(self._ZERO)))
        bias = linear.bias
        self.register_buffer("bias", torch.zeros_like(rounded.scales) if bias is None else bias.detach())
        self._packed = torch.ops.onednn.qlinear_prepack(rounded.rounded, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        largest = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
        q = to_uint8(torch.addcmul(self._shift, rows, 127 / largest))
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, self._ZERO, self._packed, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return torch.addcmul(self.bias, y, largest / 127).view(*x.shape[:-1], -1)


class DynamicInt8(torch.nn.Module):
    """torch's own dynamic quantisation: one scale for all weights, one for all inputs of a call.

    So an answer depends on its batch-mates; the audit shows it. Source: torch.ao.nn.quantized.dynamic.Linear.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        _need_cpu(linear.weight)
        weight = linear.weight.detach().float()
        scale = max(float(weight.abs().max()), 1e-12) / 127
        with warnings.catch_warnings():  # deprecated since 2.13; the only way to these products
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_tensor(weight, scale, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self._packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, True)
        return y


class Int4Weights(torch.nn.Module):
    """4-bit weights, a scale and a least value for each GROUP of inputs; a fifth of the memory."""

    packed: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        groups = weight.view(len(weight), -1, GROUP)
        least = groups.amin(-1, keepdim=True)
        scales = ((groups.amax(-1, keepdim=True) - least) / 15).clamp_min_(1e-8)
        steps = ((groups - least) / scales).round_().to(torch.uint8)  # 0 to 15
        self.bias = linear.bias
        # [out, groups, GROUP / 2]: the first half of a group in the low bits, the second in the high ones.
        self.register_buffer("packed", steps[..., : GROUP // 2] | (steps[..., GROUP // 2 :] << 4))
        self.register_buffer("scales", scales)
        self.register_buffer("least", least)

    @staticmethod
    def fits(linear: torch.nn.Linear) -> bool:
        return linear.in_features % GROUP == 0

    @property
    def weight(self) -> torch.Tensor:
        steps = torch.cat([self.packed & 15, self.packed >> 4], -1)
        return torch.addcmul(self.least, steps.to(self.scales.dtype), self.scales).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of 0 to 255, uint8: FBGEMM's own pass, a third of what clamp and .to(uint8) take."""
    q = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
    # The same bytes as a plain tensor; int_repr() would copy them.
    return torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride())


def has_fast_int8() -> bool:
    """Whether this CPU multiplies 8 bits natively (AVX512-VNNI) and this torch has the products.

    Elsewhere oneDNN falls back to kernels that are slower than float32's.
    """
    with warnings.catch_warnings():
        # torch says once a process that quantize_per_tensor is to go; it is here while torch is pinned.
        warnings.simplefilter("ignore")
        to_uint8(torch.zeros(1))
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def _need_vnni() -> None:
    if not has_fast_int8():
        raise CantOptimise(
            "it needs a CPU with AVX512-VNNI: elsewhere 8-bit products are slower than float32's"
        )


Make = Callable[[torch.nn.Linear], torch.nn.Module]


def replacing(make: Make, fits: Callable[[torch.nn.Linear], bool] = lambda linear: True) -> Any:
    """The variant that puts make(linear) in the place of every nn.Linear that fits."""

    def apply(instance: Any, calls: Sequence[Callable[[], Any]]) -> None:
        found = [layer for layer in layers(instance, torch.nn.Linear) if fits(layer)]  # type: ignore[arg-type]
        if not found:
            raise CantOptimise(f"no nn.Linear has inputs in groups of {GROUP}")
        fitting = {id(layer) for layer in found}
        replace(instance, lambda module: make(module) if id(module) in fitting else None)  # type: ignore[arg-type]

    return apply
