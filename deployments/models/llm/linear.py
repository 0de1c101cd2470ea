"""The two products of a decoder layer that decide its speed on few rows: linear layers and RMSNorm.

Owns: which kernel computes them on which device. Must not know: layers, attention, sequences.
Source: DESIGN decision 9; torch.ops.mkldnn as TorchInductor uses it; Zhang and Sennrich, "RMSNorm" (2019).
"""

import torch
import torch.nn.functional as F

from deployments.models import onednn

# oneDNN packs for an expected number of rows; packed for 16, every count up to 256 measured as fast as any.
_ROWS = 16


class Linear:
    """x [T, in] -> x @ weight.T + bias [T, out], then SiLU where asked.

    On a CPU the weight is packed for oneDNN: 16 rows of SmolLM2-135M take a third of F.linear's time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, silu: bool = False) -> None:
        self.bias, self._silu = bias, silu
        self._is_packed = onednn.can_pack(weight) and weight.dtype == torch.float32
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._is_packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            fused = torch.ops.mkldnn._linear_pointwise
            out: torch.Tensor = fused(x, self._weight, self.bias, "swish" if self._silu else "none", [], "")
            return out
        y = F.linear(x, self._weight, self.bias)
        return F.silu(y) if self._silu else y

    def dense(self) -> torch.Tensor:
        """The weight [out, in] as it was given; a copy where it is packed."""
        return self._weight.to_dense() if self._is_packed else self._weight

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """self(x) + other, in one pass over memory where packed."""
        return self._with(x, other, "add") if self._is_packed else self(x).add_(other)

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """self(x) * other, likewise."""
        return self._with(x, other, "mul") if self._is_packed else self(x).mul_(other)

    def _with(self, x: torch.Tensor, other: torch.Tensor, operation: str) -> torch.Tensor:
        fused = torch.ops.mkldnn._linear_pointwise.binary
        out: torch.Tensor = fused(x, other, self._weight, self.bias, operation)
        return out


class RMSNorm:
    """x [..., n] -> x / rms(x) * weight, whose weight may live in the linear layer that follows.

    On a CPU `fold` moves it there, and x / hypot(|x|, sqrt(n * eps)) is what is left: 17 us for
    16 rows of 576, where F.rms_norm takes 52 (28 without a weight). Elsewhere F.rms_norm is one kernel.
    floor: n * eps.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps, self._size = weight, eps, weight.shape[-1:]
        self._folds = weight.device.type == "cpu"
        self.floor = self._size[0] * eps
        self._length_floor = torch.tensor(self.floor**0.5)

    def fold(self, following: torch.Tensor) -> torch.Tensor:
        """The weight [out, n] that the following linear layer must use."""
        return following * (self._weight * self._size[0] ** 0.5) if self._folds else following

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._folds:
            return F.rms_norm(x, self._size, self._weight, self._eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self._length_floor)
