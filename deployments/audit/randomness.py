"""Whether a call draws random numbers that its answer depends on, and from which source.

Owns: seeding, the search for the source. Must not know: schedules, processes. Eight seeds: of DESIGN's
models one drew so rarely that fewer saw nothing.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from deployments.audit.findings import Property
from deployments.audit.instruments import OperatorWatch, place_of_caller
from deployments.audit.sameness import same, snapshot
from deployments.runtime.modules import parts_of

Call = Callable[[], Any]

SEEDS = 8


def _seed_torch(seed: int) -> None:
    # Not torch.manual_seed: where no GPU is in use yet it notes a traceback for each kind of device, 1 ms.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


SOURCES: Mapping[str, Callable[[int], Any]] = {
    "torch's global generator": _seed_torch,
    "Python's random": random.seed,
    "numpy's global generator": lambda seed: np.random.seed(seed % 2**32),
}


def seed_all(seed: int) -> None:
    """Every global generator that a model may draw from."""
    for source in SOURCES.values():
        source(seed)


def answer_of(call: Call, seed: int) -> Any:
    seed_all(seed)
    return snapshot(call())


def is_random(call: Call) -> bool:
    """Whether the answer follows the seeds, and is the same for the same one."""
    first = answer_of(call, 1)
    return same(first, answer_of(call, 1)) and any(not same(first, answer_of(call, seed)) for seed in (2, 3))


def check(call: Call, fresh: Callable[[], Call]) -> Property:
    """`deterministic`. fresh: the same call of an instance made anew, from seeds that are set before."""
    answers = [answer_of(call, seed) for seed in range(SEEDS)]
    if all(same(answers[0], other) for other in answers[1:]):
        return Property(True, f"{SEEDS} seeds gave the same bits", [])
    draws = draws_of(call)
    followed = [name for name in SOURCES if _follows(call, name)]
    if followed:
        named = " and ".join(followed)
        where = f", drawn by {draws[0]['operator']} at {draws[0]['at']}" if draws else ""
        return Property(False, f"the answer follows {named}{where}", draws)
    return _of_own_source(fresh, draws, call)


def _follows(call: Call, source: str) -> bool:
    """Whether the answer changes with this source's seed, and with nothing else: a second pass over the
    seeds gives what the first gave.
    """
    passes = []
    for _ in range(2):
        found = []
        for seed in range(SEEDS):
            seed_all(0)
            SOURCES[source](1 + seed)
            found.append(snapshot(call()))
        passes.append(found)
    return same(*passes) and any(not same(passes[0][0], other) for other in passes[0][1:])


def _of_own_source(fresh: Callable[[], Call], draws: list[dict[str, Any]], call: Call) -> Property:
    """Equal seeds gave other answers: what did it?"""
    own = [draw for draw in draws if draw["own_generator"]]
    if own:
        return Property(False, f"a generator of the model's own is drawn from at {own[0]['at']}", own)
    firsts = []
    for _ in range(2):
        seed_all(0)
        firsts.append(answer_of(fresh(), 0))
    if not same(*firsts):
        return Property(
            False,
            "two fresh instances with the same seeds differ: a clock, os.urandom, or memory never written",
            draws,
        )
    generators = _generators_of(call)
    if generators:
        evidence = [{"generator": name} for name in generators]
        return Property(False, f"it draws from a generator of its own: {generators[0]}", evidence)
    return Property(True, "the same calls in the same order give the same bits (see order_independent)", [])


def _generators_of(call: Call) -> list[str]:
    instance = getattr(call, "instance", None)
    parts = list(parts_of(instance)) if instance is not None else []
    return [
        name
        for name, part in parts
        if isinstance(part, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator))
    ]


def draws_of(call: Call) -> list[dict[str, Any]]:
    """The random operators of one call, each place once."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def note(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            own = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
            name, at = str(func), place_of_caller()
            found[name, at] = {"operator": name, "at": at, "own_generator": own}

    with OperatorWatch(note):
        call()
    return list(found.values())[:8]
