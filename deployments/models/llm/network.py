"""A decoder-only network (Llama, Mistral, Qwen2, Qwen3) over a ragged matrix of tokens.

Owns: the layers and how weights are merged, permuted and folded for them. Must not know: sequences,
where keys and values lie (an Attention stores and reads them), sampling. Checked against transformers.
Source: Touvron et al., "LLaMA" (2023); transformers' modeling_llama.py and modeling_qwen3.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from deployments.models.hub import read_json
from deployments.models.llm.config import DecoderShape, read_rotations, read_shape
from deployments.models.llm.linear import Linear, RMSNorm
from deployments.models.llm.weights import read_weights

Weights = dict[str, torch.Tensor]


class Attention(Protocol):
    """Keys and values of all layers, for the rows of one step."""

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """heads [T, heads + 2 * kv_heads, D], rotated: stores keys and values -> mixed [T, heads * D]."""
        ...


class AnyLayer(Protocol):
    """Layer, or what took its place (int8.py)."""

    def __call__(self, x: torch.Tensor, rotations: torch.Tensor, attend: Attention) -> torch.Tensor: ...


class Layer:
    """One pre-norm layer: [T, H] -> [T, H]. Takes its weights out of `weights`; int8.py reads its parts."""

    def __init__(self, weights: Weights, index: int, shape: DecoderShape) -> None:
        self.index, self.shape = index, shape
        prefix = f"model.layers.{index}."
        own = {name[len(prefix) :]: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        self.norm = RMSNorm(own["input_layernorm.weight"], shape.norm_eps)
        self.qkv = _merge(own, shape, self.norm)
        self.head_norm = _HeadNorm(own, shape) if shape.has_qk_norm else None
        self.out = Linear(own["self_attn.o_proj.weight"], own.get("self_attn.o_proj.bias"))
        self.ffn_norm = RMSNorm(own["post_attention_layernorm.weight"], shape.norm_eps)
        gate, up = (self.ffn_norm.fold(own[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        self.gate = Linear(gate, own.get("mlp.gate_proj.bias"), silu=True)
        self.up = Linear(up, own.get("mlp.up_proj.bias"))
        self.down = Linear(own["mlp.down_proj.weight"], own.get("mlp.down_proj.bias"))

    def __call__(self, x: torch.Tensor, rotations: torch.Tensor, attend: Attention) -> torch.Tensor:
        shape = self.shape
        heads = self.qkv(self.norm(x)).view(len(x), -1, shape.head_dim)  # [T, heads + 2 * kv_heads, D]
        rotated = heads[:, : shape.heads + shape.kv_heads]
        if self.head_norm is not None:
            rotated.copy_(self.head_norm(rotated))
        rotate_(rotated, rotations)
        x = self.out.plus(attend(self.index, heads), x)
        normed = self.ffn_norm(x)
        return self.down.plus(self.up.times(normed, self.gate(normed)), x)


class _HeadNorm:
    """Qwen3's RMSNorm of each query and key head, their two weights side by side."""

    def __init__(self, own: Weights, shape: DecoderShape) -> None:
        pairs = (
            (own["self_attn.q_norm.weight"], shape.heads),
            (own["self_attn.k_norm.weight"], shape.kv_heads),
        )
        self._weight = torch.cat([_interleave(weight, 1).expand(n, -1) for weight, n in pairs])
        self._size, self._eps = (shape.head_dim,), shape.norm_eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._size, None, self._eps).mul_(self._weight)


class Head:
    """Hidden states [n, H] -> logits [n, V]."""

    def __init__(self, norm: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        self.norm = RMSNorm(norm, eps)
        self.linear = Linear(self.norm.fold(weight))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(hidden))


class Network:
    """Token ids [T] -> hidden states [T, H] -> logits. Safe to share; it writes no state of its own.

    weights: emptied, so that no tensor lies in memory twice. rotations: complex64 [context, D / 2].
    dtype: bfloat16 on a GPU; on a CPU float32, as most have no units for less.
    """

    def __init__(
        self,
        weights: Weights,
        shape: DecoderShape,
        rotations: torch.Tensor,
        *,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        for name in list(weights):
            weights[name] = weights[name].to(device, dtype)
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        self._rotations = rotations.to(device)
        self._words = weights.pop("model.embed_tokens.weight")
        self.layers: list[AnyLayer] = [Layer(weights, i, shape) for i in range(shape.layers)]
        head = weights.pop("lm_head.weight", self._words)
        self.head: Callable[[torch.Tensor], torch.Tensor] = Head(
            weights.pop("model.norm.weight"), head, shape.norm_eps
        )

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """-> [T, H], of the network's dtype."""
        x = F.embedding(ids, self._words)
        rotations = self._rotations[positions].unsqueeze(1)  # [T, 1, D / 2]
        for layer in self.layers:
            x = layer(x, rotations, attend)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V] float32."""
        return self.head(hidden).float()


def load_network(folder: Path, device: str, dtype: torch.dtype | None = None) -> Network:
    """The network of a checkpoint folder. dtype None: bfloat16 on a GPU, float32 elsewhere.

    Raises FileNotFoundError or ValueError that says what is wrong with the folder.
    """
    config = read_json(folder / "config.json")
    shape = read_shape(config)
    rotations = read_rotations(config, shape)
    weights = read_weights(folder, shape)
    if dtype is None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.inference_mode():
        return Network(weights, shape, rotations, device=device, dtype=dtype)


def _merge(own: Weights, shape: DecoderShape, norm: RMSNorm) -> Linear:
    """Queries, keys and values in one product, in the layout that rotate_ expects."""
    counts = {"q": shape.heads, "k": shape.kv_heads, "v": 0}  # 0: values are not rotated
    weight = torch.cat([_interleave(own[f"self_attn.{n}_proj.weight"], heads) for n, heads in counts.items()])
    bias = None
    if shape.qkv_bias:
        bias = torch.cat([_interleave(own[f"self_attn.{n}_proj.bias"], heads) for n, heads in counts.items()])
    return Linear(norm.fold(weight), bias)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (0, D/2, 1, D/2 + 1, ...): the halves that rotate together become neighbours.

    Queries and keys are permuted alike, so their products stay what they were.
    """
    if not heads:
        return weight
    halves = weight.view(heads, 2, -1, *weight.shape[1:])  # [heads, 2, D / 2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def rotate_(x: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotary embedding in place: x [T, n, D] of neighbouring pairs, rotations [T, 1, D / 2] complex64.

    One complex product: 6 us for 16 rows, where halves, negation and concatenation took 30.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)  # [T, n, D / 2, 2]
    if x.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rotations))
