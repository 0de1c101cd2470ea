"""SmolLM2 with 8-bit weights against fp32 packed ones: tokens/s of 1 and 16 streams, and what it costs.

In process, decode alone, texts of 200 tokens and more; the two take turns, A B A B, and the median of the
rounds' ratios counts: once on all cores by the clock on the wall, once on one thread by its CPU seconds,
which other programs on the same cores hardly change. Perplexity, and how often both find the same next
token, on TEXT_TOKENS tokens of our own docs/decisions (plain English that no model has seen); greedy runs
of GREEDY_TOKENS on 16 questions are compared for as long as they say the same.
"""

import time
from collections.abc import Callable
from itertools import takewhile
from statistics import mean, median
from typing import Any

import torch

from deployments.core.generation import GenerationRequest
from deployments.models.llm import quality
from deployments.models.smollm2 import SmolLM2
from scripts.bench import chat
from scripts.bench.decode import Decoder
from scripts.bench.report import ROOT, Report, least, most, say
from scripts.bench.turns import Strangers

STREAMS = (1, 16)
CONTEXT = 200
TEXT_TOKENS, GREEDY_TOKENS = 2_000, 64
VARIANT = "int8"
_ASKS = ("Write a story about", "Explain to a child", "List five facts about", "Write a poem on")
_TOPICS = ("the sea", "bread", "a small dog", "the moon")


def run(*, is_short: bool) -> Report:
    rounds, steps = (1, 4) if is_short else (5, 8)
    models = {name: SmolLM2() for name in ("fp32", VARIANT)}
    for model in models.values():
        model.load("cpu")
    if not models[VARIANT].optimise(VARIANT):
        raise RuntimeError(f"SmolLM2 does not know the variant {VARIANT}")
    decoders = {name: Decoder(model, max(STREAMS)) for name, model in models.items()}
    threads, watch = torch.get_num_threads(), Strangers()
    wall = {f"streams_{n}": _rates(decoders, n, rounds, steps, time.perf_counter) for n in STREAMS}
    strangers_cores = watch.cores()
    torch.set_num_threads(1)
    cpu = {f"streams_{n}": _rates(decoders, n, rounds, steps, time.thread_time) for n in STREAMS}
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {
        "ratio": _ratios(wall),
        "ratio_of_cpu": _ratios(cpu),
        "tokens_per_s": wall,
        "tokens_per_cpu_s": cpu,
        "strangers_cores": round(strangers_cores, 3),
        "quality": _quality(models, 200 if is_short else TEXT_TOKENS),
        "greedy": _greedy(decoders, models["fp32"], 8 if is_short else GREEDY_TOKENS),
    }
    say(f"  {figures['ratio']} {figures['ratio_of_cpu']} {figures['quality']} {figures['greedy']}")
    return Report(
        "quantised",
        figures,
        [
            least("ratio.streams_1", 2.0),
            least("ratio.streams_16", 2.0),
            least("ratio_of_cpu.streams_1", 2.0),
            least("ratio_of_cpu.streams_16", 2.0),
            least("quality.agreement", 0.9),
            most("quality.perplexity_ratio", 1.01),
        ],
        {
            "variant": VARIANT,
            "context": CONTEXT,
            "steps": steps,
            "text": f"docs/decisions, its first {TEXT_TOKENS} tokens",
            "greedy_tokens": GREEDY_TOKENS,
        },
        is_short,
    )


def _ratios(rates: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """How many times faster the variant was: the median over rounds."""
    return {
        name: round(median(b / a for a, b in zip(found["fp32"], found[VARIANT], strict=True)), 3)
        for name, found in rates.items()
    }


def _rates(
    decoders: dict[str, Decoder], count: int, rounds: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Tokens/s of each, a value a round."""
    prompts = [chat.tokens(CONTEXT, seed) for seed in range(count)]
    sequences = {name: decoder.begin(prompts) for name, decoder in decoders.items()}
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds):
        for name, decoder in decoders.items():
            found[name].append(round(decoder.go_on(sequences[name], steps, clock), 1))
        shown = ", ".join(f"{name} {values[-1]:.1f}" for name, values in found.items())
        say(f"  {count} streams, round {number + 1}/{rounds}: {shown} tokens/s")
    for name, decoder in decoders.items():
        decoder.end(sequences[name])
    return found


def _quality(models: dict[str, SmolLM2], count: int) -> dict[str, Any]:
    """Of fp32 and the variant on the same text."""
    files = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    text = "\n".join(file.read_text() for file in files)
    (sequence,) = models["fp32"].prepare(GenerationRequest(prompt=text[: 8 * count], max_tokens=1))
    first, second = (model.network for model in models.values())
    found = quality.compare(first, second, [sequence.tokens[:count]])
    return {
        "perplexity": {name: round(p, 3) for name, p in zip(models, found.perplexity, strict=True)},
        "perplexity_ratio": round(found.perplexity[1] / found.perplexity[0], 4),
        "agreement": round(found.agreement, 4),
        "mean_cosine": round(found.mean_cosine, 5),
        "worst_cosine": round(found.worst_cosine, 5),
        "tokens": found.places,
    }


def _greedy(decoders: dict[str, Decoder], model: SmolLM2, count: int) -> dict[str, Any]:
    """For how long both write the same answer, left to themselves."""
    prompts = []
    for ask in _ASKS:
        for topic in _TOPICS:
            messages = [{"role": "user", "content": f"{ask} {topic}."}]
            (sequence,) = model.prepare(GenerationRequest(messages=messages, max_tokens=1))
            prompts.append(list(sequence.tokens))
    texts = []
    for decoder in decoders.values():
        sequences = decoder.begin(prompts)
        decoder.go_on(sequences, count - 1)
        decoder.end(sequences)
        texts.append([one.tokens[len(p) :] for one, p in zip(sequences, prompts, strict=True)])
    same = [
        len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True))))
        for a, b in zip(*texts, strict=True)
    ]
    return {"same_prefix_mean": round(mean(same), 1), "same_prefix": same, "tokens": count}
