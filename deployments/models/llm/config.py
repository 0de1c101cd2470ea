"""What config.json says of a decoder-only network, checked before anything is read or allocated.

Owns: which architectures are served, the numbers of the network, its rotary frequencies. Must not
know: weights, devices, sequences. Source: transformers' LlamaConfig, Qwen2Config, Qwen3Config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# "dynamic" and "longrope" change their frequencies with the length of the text: stored keys would be wrong.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The numbers of a network. context: tokens of prompt and output together.

    qkv_bias, out_bias, mlp_bias: which linear layers have one. has_qk_norm: queries and keys are
    normalised per head (Qwen3). is_tied: the embedding is the output layer's weight as well.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    context: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    has_qk_norm: bool
    is_tied: bool


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape that a parsed config.json describes. Raises ValueError: what is not served, and what is."""
    architecture = _architecture(config)
    _refuse_unserved(config)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads", heads)
    head_dim = _count(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: {heads} query heads must be a multiple of {kv_heads} key-value heads, "
            f"and head_dim {head_dim} must be even"
        )
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderShape(
        vocab=_count(config, "vocab_size"),
        hidden=hidden,
        layers=_count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_count(config, "intermediate_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        context=_count(config, "max_position_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        out_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )


def read_rotations(config: Mapping[str, Any], shape: DecoderShape) -> torch.Tensor:
    """Rotary embedding of every position: complex64 [context, head_dim / 2]. Raises ValueError."""
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"config.json: rope type {kind!r} is not served; served are {', '.join(_ROPE_TYPES)}"
        )
    frequencies, scale = _frequencies(config, shape, kind)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies)
    return torch.polar(torch.tensor(scale), angles)


def _frequencies(config: Mapping[str, Any], shape: DecoderShape, kind: str) -> tuple[torch.Tensor, float]:
    if kind == "default":
        base = float(_rope(config).get("rope_theta", config.get("rope_theta", 10_000.0)))
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / base**exponents, 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parsed = AutoConfig.for_model(**config)
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](parsed, "cpu")
    return frequencies.float(), float(scale)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes rope_parameters, earlier ones rope_scaling beside rope_theta."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ["none named"]
    if names[0] not in SERVED:
        raise ValueError(
            f"config.json: architecture {names[0]} is not served; served are {', '.join(SERVED)}"
        )
    return str(names[0])


def _refuse_unserved(config: Mapping[str, Any]) -> None:
    """What would give other text than the model's own, silently."""
    mistral = "Mistral" in _architecture(config)
    slides = config.get("sliding_window") is not None and config.get("use_sliding_window", mistral)
    if slides or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            "config.json: sliding-window attention is not served; only models with full attention are"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not served; only silu is")
    if config.get("quantization_config"):
        raise ValueError(
            "config.json: quantised weights are not served; use the float checkpoint of this model"
        )
    if _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not served; only full rotary embeddings are")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value
