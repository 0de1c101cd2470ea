"""A loop by hand around LLMRunner, and tiny checkpoints for it, written by transformers itself."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from deployments.core.generation import Delta, FinishReason
from deployments.engine.sequence import Advance, Copy, Sequence, Step, Work
from deployments.models.llm.choice import Sampled

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"rope_theta": 5e4}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "llama3-rope": (
        transformers.LlamaConfig,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn-rope": (
        transformers.Qwen2Config,
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


def write_checkpoint(folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of this kind, saved to `folder`; its transformers twin, with biases that matter."""
    config_class, own = KINDS[kind]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**TINY, **own, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.eval().save_pretrained(folder, **({"max_shard_size": "40KB"} if changes.get("shards") else {}))
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@dataclass
class FakeChoice:
    """Ends after `most` tokens; raises where told."""

    most: int
    raises: Exception | None = None
    tokens: list[int] = field(default_factory=list)

    def accept(self, sampled: Sampled, *, cached_tokens: int = 0) -> Delta:
        if self.raises is not None:
            raise self.raises
        self.tokens.append(sampled.token)
        done = FinishReason.LENGTH if len(self.tokens) == self.most else None
        return Delta(str(sampled.token), len(self.tokens), finish_reason=done)


class Greedy:
    """Keeps the last logits, and takes the most probable token of each row."""

    def sample(self, logits: torch.Tensor, choices: Any) -> list[Sampled]:
        assert len(logits) == len(choices)
        self.logits = logits.clone()
        finite = logits.isfinite().all(-1).tolist()
        return [Sampled(t, is_finite=f) for t, f in zip(logits.argmax(-1).tolist(), finite, strict=True)]


def sequence(tokens: list[int], slot: int, most: int = 8, blocks: list[int] | None = None) -> Sequence:
    return Sequence(
        payload=FakeChoice(most), tokens=list(tokens), known=len(tokens), slot=slot, blocks=blocks or []
    )


def work(one: Sequence, count: int | None = None) -> Work:
    """Its next `count` units, all of them by default."""
    count = one.remaining if count is None else min(count, one.remaining)
    return Work(one, one.computed, count, is_last=count == one.remaining, blocks=one.blocks)


def step(
    works: list[Work],
    *,
    saves: list[Copy] | None = None,
    freed: list[int] | None = None,
    loads: list[Copy] | None = None,
) -> Step:
    return Step(works, saves or [], freed or [], [], loads or [], "", 0.0)


def advance(runner: Any, now: Step) -> list[Advance]:
    """Run it and do the engine's bookkeeping."""
    advances: list[Advance] = runner.run(now)
    for one, made in zip(now.work, advances, strict=True):
        one.sequence.computed += one.count
        one.sequence.known += made.units
        if made.token is not None:
            one.sequence.tokens.append(made.token)
    return advances


def expect(model: Any, prompt: list[int], most: int) -> list[int]:
    """Greedy text by transformers."""
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
        )
    return ids[0, len(prompt) :].tolist()


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """After the last token: [V]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]
