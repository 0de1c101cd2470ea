"""What the language model's benchmarks have in common: the application, its requests, its figures.

Owns: the mix of prompts and outputs, bodies for the completions routes, and which fields of
`/chat/stats` mean what. Prompts are token ids drawn from a seed, so that every server gets the same.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.server import Server, continuous

MODEL = "deployments.models.smollm2:SmolLM2"
SLOTS = 16
PATH = "/chat/v1/completions"
VOCABULARY = range(1_000, 40_000)
"""Of SmolLM2, without special tokens."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt of token ids and how many tokens to generate, greedily, whatever they are."""

    prompt: tuple[int, ...]
    max_tokens: int

    def body(self, *, is_streamed: bool = True, model: str = "chat", **more: Any) -> bytes:
        """For a completions route, ours or llama.cpp's."""
        fields: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if is_streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields | more).encode()


def application(**args: Any) -> dict[str, Any]:
    return continuous("chat", MODEL, **{"max_sequences": SLOTS} | args)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """`count` token ids; another seed gives a prompt that shares no prefix with this one."""
    source = random.Random(seed)
    return tuple(source.choices(VOCABULARY, k=count))


def mix(count: int, seed: int, longest: int = 256) -> list[Job]:
    """Prompts and outputs of 16 to `longest` tokens, evenly spread."""
    source = random.Random(seed)
    return [
        Job(tokens(source.randint(16, longest), source.getrandbits(32)), source.randint(16, longest))
        for _ in range(count)
    ]


def total_tokens(jobs: Sequence[Job]) -> int:
    return sum(job.max_tokens for job in jobs)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of an engine's figures in `/NAME/stats` (docs/reference/stats.md); sums since start.

    units: work done; of a decode step, its rows. tasks: asyncio's, of the replica. blocks_held: by
    sequences; what only the prefix cache holds is free for whoever needs it.
    """

    steps: int
    units: int
    running: int
    waiting: int
    blocks_held: int
    in_flight: int
    tasks: int
    step_s: dict[str, float]

    @staticmethod
    def read(server: Server, app: str = "chat") -> "EngineStats":
        stats = server.stats(app)
        engine = stats["engine"]
        return EngineStats(
            steps=engine["steps"],
            units=engine["units"],
            running=engine["running"],
            waiting=engine["waiting"],
            blocks_held=engine["blocks_used"],
            in_flight=stats["in_flight"],
            tasks=stats.get("tasks", 0),
            step_s=dict(engine["step_s"]),
        )

    def since(self, before: "EngineStats") -> "EngineStats":
        """Sums as differences; what is there now as it is."""
        return EngineStats(
            self.steps - before.steps,
            self.units - before.units,
            self.running,
            self.waiting,
            self.blocks_held,
            self.in_flight,
            self.tasks,
            {part: seconds - before.step_s[part] for part, seconds in self.step_s.items()},
        )
