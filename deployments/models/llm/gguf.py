"""A GGUF file of the Llama family as a Hugging Face folder: safetensors, config, tokenizer, template.

Owns: names, layout and tokenizer settings on both sides. Must not know: where the folder lies (cache.py),
how the network runs. transformers can read such a file too, in 40 s and with accelerate; this takes 9 s.
Source: the GGUF specification (ggml-org/ggml, docs/gguf.md); what is permuted: llama.cpp's
convert_hf_to_gguf.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYOUT = 1
"""Of what `convert` writes; a cache made with another number is made anew."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of special tokens
_logger = logging.getLogger(__name__)


def convert(source: Path, folder: Path) -> None:
    """Write the model of the GGUF file `source` into the existing `folder`, in Hugging Face's layout.

    Raises ValueError where it is another architecture or tokenizer than the ones read here.
    """
    _logger.info("event=convert_begins file=%s", source.name)
    reader = gguf.GGUFReader(source)  # half of the time: it builds an array for each of 10^5 strings
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"{source.name}: only Llama models with SmolLM's tokenizer are converted")
    config = _read_config(meta, {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")}
    )
    _write_json(folder / "tokenizer_config.json", _read_tokenizer_config(meta))
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")
    _make_tokenizer(meta).save(str(folder / "tokenizer.json"))
    save_file(_read_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})


def _read_config(meta: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": meta["llama.context_length"],
        # float32 in the file: 9.99999975e-06 was 1e-05
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _read_weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for index, tensor in enumerate(reader.tensors):
        if index % 64 == 0:
            _logger.info("event=converting weights=%d of=%d", index, len(reader.tensors))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        if part in heads:
            values = _unpermute(values, heads[part])
        weights[_rename(tensor.name)] = np.ascontiguousarray(values)
    return weights


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of the rows of q and k within a head.

    There the two numbers that a rotary angle turns lie side by side (2i, 2i + 1), here half a head
    apart (i, i + half).
    """
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _rename(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ValueError if unknown."""
    match name.split("."):
        case [part, "weight"] if part in _TOP:
            return f"{_TOP[part]}.weight"
        case ["blk", layer, part, "weight"] if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.weight"
    raise ValueError(f"no known place for the tensor {name}")


def _make_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        **{name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
