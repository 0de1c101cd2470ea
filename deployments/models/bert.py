"""BERT's encoder over ragged batches: one [T, H] matrix of all tokens, no padding anywhere.

Owns: the network and its two ways to compute attention per sequence. Must not know: text, pooling.
Checked against transformers' BertModel to 1e-6. Thread-safe: `__call__` writes no state. Plain layers; a
layer's `products` may be replaced by faster ones (onednn.py, int8.py).
Source: Devlin et al., "BERT" (2018); DESIGN decision 3 on why ragged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from deployments.models.varlen import varlen_attention


@dataclass(frozen=True, slots=True)
class BertShape:
    """The numbers of config.json that the network needs."""

    layers: int
    heads: int
    hidden: int
    layer_norm_eps: float


@dataclass(frozen=True, slots=True)
class Ragged:
    """Where the sequences of a [T, ...] matrix begin and end: sequence i is rows starts[i]:starts[i+1].

    lengths: on the host. starts: int32 [B + 1] on the model's device.
    """

    lengths: list[int]
    starts: torch.Tensor


class Linear:
    """x [T, in] -> x @ weight.T + bias [T, out], then GELU where asked, and what else is added to it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, gelu: bool = False) -> None:
        self.weight, self.bias, self.gelu = weight, bias, gelu

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        y = F.gelu(y) if self.gelu else y
        return y if residual is None else y + residual


class Product(Protocol):
    """What may stand in the place of a Linear, with the same meaning."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class Layer:
    """One transformer layer, post-norm: [T, H] -> [T, H]."""

    def __init__(self, weights: Mapping[str, torch.Tensor], shape: BertShape) -> None:
        self._shape = shape
        attention = "attention.self."
        parts = [(weights[f"{attention}{n}.weight"], weights[f"{attention}{n}.bias"]) for n in _QKV]
        self.plain = {
            "qkv": Linear(torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])),
            "out": Linear(*_pair(weights, "attention.output.dense")),
            "up": Linear(*_pair(weights, "intermediate.dense"), gelu=True),
            "down": Linear(*_pair(weights, "output.dense")),
        }
        self.products: dict[str, Product] = dict(self.plain)
        self._norm = _pair(weights, "attention.output.LayerNorm")
        self._norm_out = _pair(weights, "output.LayerNorm")

    def __call__(self, hidden: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        size, eps = (self._shape.hidden,), self._shape.layer_norm_eps
        heads = self._shape.heads
        product = self.products
        qkv = product["qkv"](hidden).view(len(hidden), 3, heads, -1)  # [T, 3, heads, H / heads]
        mixed = attend(qkv, ragged).reshape(len(hidden), -1)  # [T, H]
        hidden = F.layer_norm(product["out"](mixed, hidden), size, *self._norm, eps)
        return F.layer_norm(product["down"](product["up"](hidden), hidden), size, *self._norm_out, eps)


_QKV = ("query", "key", "value")


def _pair(weights: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def attend(qkv: torch.Tensor, ragged: Ragged) -> torch.Tensor:
    """Attention within each sequence: qkv [T, 3, heads, D] -> [T, heads, D]."""
    if can_varlen(qkv) and (varlen := varlen_attention()):
        query, key, value = qkv.unbind(1)
        longest = max(ragged.lengths)
        starts = ragged.starts
        mixed = varlen(query, key, value, starts, starts, longest, longest)
        assert isinstance(mixed, torch.Tensor)
        return mixed
    return attend_one_by_one(qkv, ragged)


def can_varlen(qkv: torch.Tensor) -> bool:
    """PyTorch's variable-length attention is FlashAttention: half precision on Ampere or later."""
    return (
        qkv.is_cuda
        and qkv.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    )


def attend_one_by_one(qkv: torch.Tensor, ragged: Ragged) -> torch.Tensor:
    """The same for any device and dtype: one call of scaled_dot_product_attention a sequence."""
    each = qkv.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)  # [1, heads, T, D] three times
    queries, keys, values = (torch.split(part, ragged.lengths, 2) for part in each)
    mixed = [
        F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # [1, n, heads, D]
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(mixed, 1).squeeze(0)


class RaggedBert:
    """The encoder: token ids [T] and their positions [T] -> hidden states [T, H].

    weights: transformers' names, float32; they are moved to `device` and `dtype` here.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shape: BertShape,
        *,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        here = {name: w.to(device, dtype).contiguous() for name, w in weights.items()}
        self._shape, self.device = shape, torch.device(device)
        self._words = here["embeddings.word_embeddings.weight"]
        # Every token is of type 0, so its embedding is folded into the positions'.
        kinds = here["embeddings.token_type_embeddings.weight"]
        self._positions = here["embeddings.position_embeddings.weight"] + kinds[0]
        self._norm = _pair(here, "embeddings.LayerNorm")
        prefixes = [f"encoder.layer.{i}." for i in range(shape.layers)]
        self.layers = [
            Layer({k[len(p) :]: w for k, w in here.items() if k.startswith(p)}, shape) for p in prefixes
        ]

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        size = (self._shape.hidden,)
        hidden = F.embedding(ids, self._words).add_(F.embedding(positions, self._positions))
        hidden = F.layer_norm(hidden, size, *self._norm, self._shape.layer_norm_eps)
        for layer in self.layers:
            hidden = layer(hidden, ragged)
        return hidden  # [T, H]
