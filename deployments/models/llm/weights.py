"""The tensors of a checkpoint folder in Hugging Face's layout, complete and of the right shapes.

Owns: file names, tensor names and their check; reads safetensors alone, never pickle. Must not know:
how the network computes. Source: the safetensors format; transformers' names of the Llama family.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from deployments.models.hub import read_json
from deployments.models.llm.config import DecoderShape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = Mapping[str, tuple[int, ...]]


def read_weights(folder: Path, shape: DecoderShape) -> dict[str, torch.Tensor]:
    """All weights of the network by transformers' names, as stored, on the CPU.

    Raises FileNotFoundError or ValueError that names the file and the first tensors at fault.
    """
    expected = expected_shapes(shape)
    found: dict[str, torch.Tensor] = {}
    for file in _files(folder):
        found.update(_read(file))
    for name in [n for n in found if _is_spare(n, shape)]:
        del found[name]
    _check(found, expected, folder)
    return found


def expected_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this shape holds."""
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.is_tied:
        expected["lm_head.weight"] = (shape.vocab, shape.hidden)
    layer = _layer_shapes(shape)
    for i in range(shape.layers):
        expected.update({f"model.layers.{i}.{name}": size for name, size in layer.items()})
    return expected


def _layer_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (queries, shape.hidden, shape.qkv_bias),
        "self_attn.k_proj": (keys, shape.hidden, shape.qkv_bias),
        "self_attn.v_proj": (keys, shape.hidden, shape.qkv_bias),
        "self_attn.o_proj": (shape.hidden, queries, shape.out_bias),
        "mlp.gate_proj": (shape.ffn, shape.hidden, shape.mlp_bias),
        "mlp.up_proj": (shape.ffn, shape.hidden, shape.mlp_bias),
        "mlp.down_proj": (shape.hidden, shape.ffn, shape.mlp_bias),
    }
    expected: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    for name, (out, inner, has_bias) in linears.items():
        expected[f"{name}.weight"] = (out, inner)
        if has_bias:
            expected[f"{name}.bias"] = (out,)
    if shape.has_qk_norm:
        expected["self_attn.q_norm.weight"] = expected["self_attn.k_norm.weight"] = (shape.head_dim,)
    return expected


def _files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise FileNotFoundError(
                f"{folder} has neither {SINGLE} nor {INDEX}; weights are read from safetensors alone"
            )
        return [folder / SINGLE]
    names = set(read_json(folder / INDEX).get("weight_map", {}).values())
    # A name with a path in it could point outside the model's folder.
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{folder / INDEX} must map tensors to files of its own folder")
    return [folder / name for name in sorted(names)]


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no readable safetensors file (download it again): {error}") from error


def _is_spare(name: str, shape: DecoderShape) -> bool:
    """Old checkpoints store rotary tables, and some tied ones the output layer twice."""
    return name.endswith("rotary_emb.inv_freq") or (shape.is_tied and name == "lm_head.weight")


def _check(found: Mapping[str, torch.Tensor], expected: Shapes, folder: Path) -> None:
    wrong = [n for n in expected if n in found and tuple(found[n].shape) != expected[n]]
    faults = []
    if missing := expected.keys() - found.keys():
        faults.append(f"missing: {_some(missing)}")
    if unexpected := found.keys() - expected.keys():
        faults.append(f"not of this architecture: {_some(unexpected)}")
    if wrong:
        sizes = [f"{n} is {list(found[n].shape)}, not {list(expected[n])}" for n in wrong]
        faults.append(f"other shape than config.json says: {_some(sizes)}")
    if faults:
        raise ValueError(f"the weights in {folder} don't fit its config.json; {'; '.join(faults)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
