"""oneDNN's own layout of weights on a CPU, with bias, GELU or the residual fused into the product.

Owns: whether a weight may be packed, and a packed product. Must not know: any network.
Source: torch.ops.mkldnn, as TorchInductor uses it.
"""

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """True on a CPU where this torch was built with oneDNN."""
    return weight.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class PackedLinear:
    """x [T, in] -> x @ weight.T + bias [T, out], GELU or the residual in the same pass."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, gelu: bool = False) -> None:
        self._bias, self._gelu = bias, gelu
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2048)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        fused = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            out: torch.Tensor = fused.binary(x, residual, self._packed, self._bias, "add")
        elif self._gelu:
            out = fused(x, self._packed, self._bias, "gelu", [], "none")
        else:
            out = fused(x, self._packed, self._bias, "none", [], "")
        return out
