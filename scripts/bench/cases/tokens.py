"""Output tokens/s of a language model over HTTP, against transformers' continuous batching and llama.cpp.

24 requests at once, prompts and outputs of 16 to 256 tokens, 16 slots, greedy, fp32. The three take turns,
A B C A B C A: each of the others lies between two of ours and is compared with their mean. transformers
runs in process, without HTTP; llama.cpp's server is asked by the same client as ours.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from scripts.bench import chat
from scripts.bench.offline import Reference
from scripts.bench.peers import llama_server, transformers_cb
from scripts.bench.report import Report, Target, least, say
from scripts.bench.server import Server
from scripts.bench.streams import Ask, Heard, listen
from scripts.bench.turns import Strangers, against_neighbours

ROUNDS, REQUESTS, LONGEST, SEED = 3, 24, 256, 7
BEGINNING = 24
"""Characters of a text that are compared between servers: later, near ties between logits part them."""


def run(*, is_short: bool) -> Report:
    targets = [least("ratio.transformers", 3.0), least("ratio.llama", 1.3)]
    return measure("tokens", chat.application(), targets, is_short=is_short)


def measure(name: str, config: dict[str, Any], targets: list[Target], *, is_short: bool) -> Report:
    """The whole comparison for one form of our application. Targets of missing peers are left out."""
    rounds, count, longest = (1, 4, 32) if is_short else (ROUNDS, REQUESTS, LONGEST)
    jobs = chat.mix(count, SEED, longest)
    found: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    with ExitStack() as stack:
        server = stack.enter_context(Server(config))
        reference = stack.enter_context(Reference(partial(transformers_cb.passes, count, SEED, longest)))
        ways: dict[str, Callable[[], float]] = {
            "ours": lambda: _over_http(server.port, chat.PATH, jobs, texts.setdefault("ours", [])),
            "transformers": lambda: reference.rate(0.0),
        }
        missing = llama_server.find()
        if isinstance(missing, str):
            say(f"  without llama.cpp: {missing}")
        else:
            llama = stack.enter_context(llama_server.LlamaServer(*missing))
            ways["llama"] = lambda: _over_http(
                llama.port, llama_server.PATH, jobs, texts.setdefault("llama", []), cache_prompt=False
            )
        for way in ("ours", "llama"):
            if way in ways:
                ways[way]()  # warm-up; Reference has had its own
        watch = Strangers()
        for number in range(rounds):
            for way, ask in ways.items():
                found.setdefault(way, []).append(ask())
            say(f"  round {number + 1}/{rounds}: " + ", ".join(f"{n} {v[-1]:.1f}" for n, v in found.items()))
        found["ours"].append(ways["ours"]())
        strangers_cores = watch.cores()
    return Report(
        name,
        _figures(found, texts) | {"strangers_cores": round(strangers_cores, 3)},
        [target for target in targets if target.figure.removeprefix("ratio.") in found],
        {
            "application": config["args"],
            "requests": count,
            "tokens": [16, longest],
            "output_tokens": chat.total_tokens(jobs),
            "llama_cpp": missing if isinstance(missing, str) else "f32 weights, 16 slots of 512 tokens",
            "transformers": f"pages of {transformers_cb.PAGE}, {transformers_cb.STEP_TOKENS} tokens a step",
        },
        is_short,
    )


def _over_http(port: int, path: str, jobs: list[chat.Job], texts: list[str], **more: Any) -> float:
    """Output tokens/s from the first request to the end of the last answer."""
    heard = listen(port, [Ask(path, job.body(**more)) for job in jobs])
    _check(heard, jobs)
    texts[:] = [one.text for one in heard]
    return chat.total_tokens(jobs) / max(one.end_s for one in heard)


def _check(heard: list[Heard], jobs: list[chat.Job]) -> None:
    """RuntimeError where an answer is no answer, or short: a rate of less work would be no rate."""
    for one, job in zip(heard, jobs, strict=True):
        if one.error or one.tokens != job.max_tokens:
            raise RuntimeError(f"{one.tokens} of {job.max_tokens} tokens, status {one.status}: {one.error}")


def _figures(found: dict[str, list[float]], texts: dict[str, list[str]]) -> dict[str, Any]:
    ratios = against_neighbours(found)
    figures: dict[str, Any] = {
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "tokens_per_s": {name: [round(value, 1) for value in values] for name, values in found.items()},
    }
    if "llama" in texts:
        same = sum(a[:BEGINNING] == b[:BEGINNING] for a, b in zip(texts["ours"], texts["llama"], strict=True))
        figures["same_beginnings_as_llama"] = round(same / len(texts["ours"]), 3)
    return figures
