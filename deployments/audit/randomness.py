"""Whether a call draws random numbers that its answer depends on, and from which source.

Owns: seeding, the search for the source. Must not know: schedules, processes. Eight seeds: of DESIGN's
models one drew so rarely that fewer saw nothing.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from deployments.audit.findings import Property
from deployments.audit.forks import Isolate, here
from deployments.audit.instruments import place_of_caller, watch_operators
from deployments.audit.sameness import digest
from deployments.runtime.modules import parts_of

Call = Callable[[], Any]

SEEDS = 8
FEW_SEEDS = 3


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


def answer_of(call: Call, seed: int) -> str:
    """A digest of it, after all generators are seeded."""
    seed_all(seed)
    return digest(call())


def is_random(call: Call, isolate: Isolate = here) -> bool:
    """Whether the answer follows the seeds, and is the same for the same one."""
    return len({answer_of(call, seed) for seed in range(FEW_SEEDS)}) > 1 and _follows(
        call, seed_all, range(FEW_SEEDS), isolate
    )


def check(call: Call, isolate: Isolate = here) -> Property:
    """`deterministic`. isolate: forks, from which the answers of a model that keeps something come from one
    state."""
    if len({answer_of(call, seed) for seed in range(SEEDS)}) == 1:
        return Property(True, f"{SEEDS} seeds gave the same bits", [])
    alike = {isolate(partial(answer_of, call, seed)) for seed in range(SEEDS)}
    draws = draws_of(call)
    if len(alike) > 1:
        followed = [name for name, seed in SOURCES.items() if _follows(call, seed, range(SEEDS), isolate)]
        if followed:
            named = " and ".join(followed)
            where = f", drawn by {draws[0]['operator']} at {draws[0]['at']}" if draws else ""
            return Property(False, f"the answer follows {named}{where}", draws)
        if isolate is not here:
            return Property(False, "the same call from the same state differs: a clock, or os.urandom", draws)
    own = [draw for draw in draws if draw["own_generator"]]
    if own:
        return Property(False, f"a generator of the model's own is drawn from at {own[0]['at']}", own)
    generators = _generators_of(call)
    if generators:
        evidence = [{"generator": name} for name in generators]
        return Property(False, f"it draws from a generator of its own: {generators[0]}", evidence)
    return Property(True, "the same calls in the same order give the same bits (see order_independent)", [])


def _follows(call: Call, seed: Callable[[int], Any], seeds: Sequence[int], isolate: Isolate) -> bool:
    """Whether the answer changes with what this seeds, and with nothing else: a second pass over the seeds,
    backwards, gives each what the first gave it. (A counter modulo n would, in order.)
    """

    def answer(number: int) -> str:
        seed_all(0)
        seed(1 + number)
        return digest(call())

    first = {number: isolate(partial(answer, number)) for number in seeds}
    second = {number: isolate(partial(answer, number)) for number in reversed(seeds)}
    return first == second and len(set(first.values())) > 1


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

    with watch_operators(note):
        call()
    return list(found.values())[:8]
