"""8-bit products on a CPU with calibrated scales: one pass to quantise, all else in oneDNN's product.

Owns: the ranges that inputs of products take, and the product in 8 bits. Must not know: any network. Scales
are fixed at load, so a row's answer is the same in every batch, bit for bit: the sums are of whole numbers.
Sources: Xiao et al., "SmoothQuant" (2022), for moving outlying channels into the weights; torch.ops.onednn,
as TorchInductor uses it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from deployments.runtime.optimise.linears import DynamicInt8, to_uint8

SMOOTHING = 0.6
"""How much of a channel's spread goes into its weights. MiniLM, mean cosine at 0.3: 0.9944, 0.5: 0.9954,
0.6: 0.9956, 0.7: 0.9956, 1: 0.9937; without smoothing 0.9926."""

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of what was seen, as a range: the one whose squared error is least."""

EXTRA_CHANNELS = 16
"""For pieces of wide channels, 1 % of MiniLM's 1,536. Mean and worst cosine of 64 sentences with 8: 0.9978,
0.9945; 16: 0.9977, 0.9952; 32: 0.9973, 0.9937; 64: 0.9965, 0.9894 (seams); none: 0.9967, 0.9909."""

ALIGNED = 64
"""What the channels between two products are a multiple of: oneDNN's blocks; 1,600 take less than 1,552."""

SAMPLES = 512
"""Rows kept of each input to choose its range by."""


class Linear(Protocol):
    """A plain product: weight [out, in], bias [out], and whether GELU follows."""

    weight: torch.Tensor
    bias: torch.Tensor
    gelu: bool

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class Watched:
    """A plain product that keeps the range of each input channel, and some rows."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        inputs = linear.weight.shape[1]
        self.low, self.high = torch.zeros(inputs), torch.zeros(inputs)
        self._rows: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self._rows.append(x[:: max(1, len(x) // 64)])
        return self.linear(x, residual)

    @property
    def rows(self) -> torch.Tensor:
        """[<= SAMPLES, in]: some of the inputs, from all calls alike."""
        rows = torch.cat(self._rows)
        return rows[:: -(-len(rows) // SAMPLES)]


class Range:
    """Real numbers as 8 bits without a sign: x / smooth = (q - zero) * scale."""

    def __init__(self, low: float, high: float) -> None:
        self.scale = max(high - low, 1e-8) / 255
        self.zero = min(255, max(0, round(-low / self.scale)))

    @classmethod
    def of(cls, seen: Watched, smooth: torch.Tensor) -> "Range":
        """The one with the least squared error of what was seen."""
        low, high, rows = seen.low / smooth, seen.high / smooth, seen.rows / smooth
        ranges = [cls(float(low.min()) * clip, float(high.max()) * clip) for clip in CLIPS]
        return min(ranges, key=lambda one: one.error(rows))

    def error(self, rows: torch.Tensor) -> float:
        """Mean square of what rounding changes."""
        near = ((rows / self.scale + self.zero).round_().clamp_(0, 255) - self.zero) * self.scale
        return float((near - rows).square_().mean())


class Int8Linear:
    """x [T, in] float32, or uint8 from the product before -> x @ weight.T + bias, GELU, plus the residual.

    next_range: of the product that follows; the answer is then uint8 in that range, made in the same pass.
    """

    def __init__(
        self, linear: "Linear | _Wider", own_range: Range, next_range: Range | None, smooth: torch.Tensor
    ) -> None:
        weight = linear.weight
        smoothed = weight * smooth
        self._scales = (smoothed.abs().amax(1) / 127).clamp_min_(1e-12)
        rounded = (smoothed / self._scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._bias, self._range, self._next = linear.bias, own_range, next_range
        self._shift = torch.full((weight.shape[1],), float(own_range.zero))
        self._inverse = 1.0 / (smooth * own_range.scale)
        self._after: tuple[Any, ...] = ("gelu", [], "none") if linear.gelu else ("none", [], "")

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        q = x if x.dtype == torch.uint8 else to_uint8(torch.addcmul(self._shift, x, self._inverse))
        found = (q, self._range.scale, self._range.zero, self._weight, self._scales, self._zeros)
        product: Any = torch.ops.onednn.qlinear_pointwise
        if residual is not None:
            out: torch.Tensor = product.binary(
                *found, residual, self._bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""
            )
        elif self._next is not None:
            out = product(*found, self._bias, self._next.scale, self._next.zero, torch.uint8, *self._after)
        else:
            out = product(*found, self._bias, 1.0, 0, torch.float32, *self._after)
        return out


def smoothing_of(seen: Watched) -> torch.Tensor:
    """[in]: what each input channel is divided by, and its weights multiplied."""
    spread = torch.maximum(-seen.low, seen.high).clamp_min_(1e-5)
    weight = seen.linear.weight.abs().amax(0).clamp_min_(1e-5)
    smooth = spread**SMOOTHING / weight ** (1 - SMOOTHING)
    return smooth / smooth.mean()


def linear(seen: Watched) -> Int8Linear:
    """A product of float32 inputs, with float32 outputs."""
    smooth = smoothing_of(seen)
    return Int8Linear(seen.linear, Range.of(seen, smooth), None, smooth)


def pair(up: Watched, down: Watched) -> tuple[Int8Linear, Int8Linear]:
    """Two products with GELU between them, where 8 bits pass: up's outputs leave in down's range.

    A few channels of GELU's output are ten times as wide as the rest and would make the steps coarse for
    all, and GELU lets no scale through to smooth them. So a wide channel x is cut into pieces: min(gelu(x),
    top), which is what saturation does, and gelu(x - top), gelu(x - 2 top), ..., channels of their own with
    x's weights. Their sum is gelu(x), but within 2 of a seam, where it is at most 0.2 off.
    """
    top = _top_of(down.high)
    pieces = (down.high / top).ceil_().long().clamp_min_(1) - 1
    extra = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
    number = torch.cat([torch.arange(1, int(n) + 1) for n in pieces[pieces > 0]]) if len(extra) else extra
    spare = -(len(pieces) + len(extra)) % ALIGNED
    weight, bias = up.linear.weight, up.linear.bias
    wider = _Wider(
        torch.cat([weight, weight[extra], weight.new_zeros(spare, weight.shape[1])]),
        torch.cat([bias, bias[extra] - number * top, bias.new_zeros(spare)]),
        gelu=True,
    )
    weight = down.linear.weight
    longer = torch.cat([weight, weight[:, extra], weight.new_zeros(len(weight), spare)], 1)
    between, smooth = Range(float(down.low.min()), top), smoothing_of(up)
    first = Int8Linear(wider, Range.of(up, smooth), between, smooth)
    second = _Wider(longer, down.linear.bias, gelu=False)
    return first, Int8Linear(second, between, None, torch.ones(longer.shape[1]))


def _top_of(high: torch.Tensor) -> float:
    """The least end of a range for which all channels fit, the wide ones in EXTRA_CHANNELS pieces more."""
    tops = torch.linspace(1.0, max(1.0, float(high.max())), 200)
    return float(next(top for top in tops if ((high / top).ceil() - 1).clamp_min(0).sum() <= EXTRA_CHANNELS))


@dataclass(frozen=True, slots=True)
class _Wider:
    """Weights of a product that was given more channels."""

    weight: torch.Tensor
    bias: torch.Tensor
    gelu: bool


class Dynamic:
    """torch's own dynamic 8 bits, one scale for all rows of a call: fast, off, and batch-mates meet."""

    def __init__(self, linear: Linear) -> None:
        outputs, inputs = linear.weight.shape
        plain = torch.nn.Linear(inputs, outputs, device="meta")
        plain.weight, plain.bias = torch.nn.Parameter(linear.weight), torch.nn.Parameter(linear.bias)
        self._product, self._gelu = DynamicInt8(plain), linear.gelu

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self._product(x)
        y = F.gelu(y) if self._gelu else y
        return y if residual is None else y + residual
