"""Calls that overlap: the search for a schedule that makes a difference, and its replay, in a process each.

Owns: which instances race how, and for how long. Must not know: how processes are run, what follows.
"""

import time
from collections.abc import Callable
from typing import Any

from deployments.audit.forks import in_fork, threads_now
from deployments.audit.instances import Call, asked_in_order, begin_for, can_fork, load_alike, warm_up
from deployments.audit.races import Races
from deployments.audit.subject import Subject
from deployments.audit.target import Known, Target
from deployments.audit.trials import Trial
from deployments.runtime.copies import Weights

Say = Callable[[Any], None]

LATEST = 4.0
"""Times its share a search may take for the least number of trials."""
SLOW_SHARE = 0.5
"""Of its share, for a slow model: all else takes longer, too."""
FEW_COPIES = 3
"""The least number for copies of a model whose threads are safe."""


def search(
    say: Say, target: Target, known: Known, kind: str, seed: int, seconds: float, is_known: bool
) -> dict[str, Any]:
    """Of `kind` threads (two calls and more in one warmed-up instance), copies (across two instances, as a
    pool makes them) or cold (the first calls of an instance): {"found": what a trial found, as JSON, or None;
    "across": a call that the second copy answers otherwise than the first did, or None}. is_known: threads in
    one instance were seen to be safe, and copies share less: a few trials are enough.
    """
    across: list[int] = []
    races = races_of(target, known, kind, on_across=across.append)
    enough = FEW_COPIES if is_known else known.least_trials
    full_s = seconds * SLOW_SHARE if known.is_slow else seconds
    began = time.monotonic()

    def has_time() -> bool:
        spent_s = time.monotonic() - began
        return spent_s < full_s or (races.runs < enough and spent_s < LATEST * seconds)

    races.on_trial = lambda trial: say(trial.as_json())
    found = races.search(seed=seed, has_time=has_time)
    say(races.runs)
    told = None if found is None else {**found.as_json(), "runs": races.runs}
    return {"found": told, "across": across[0] if across else None}


def replay(
    say: Say, target: Target, known: Known, kind: str, trial: dict[str, Any], prefix: tuple[int, int] | None
) -> dict[str, Any] | None:
    """One trial again, as `search` made it: what it found, with all of its steps. prefix: (seed, runs) of the
    search, all of whose trials are made again, where what they left behind is part of the race."""
    races = races_of(target, known, kind)
    if prefix is None:
        found = races.run(Trial.from_json(trial), looks_later=True)
    else:
        seed, runs = prefix
        found = races.search(seed=seed, has_time=lambda: races.runs < runs)
    return None if found is None else found.as_json()


def races_of(
    target: Target, known: Known, kind: str, *, on_across: Callable[[int], None] = lambda call: None
) -> Races:
    """The races of a kind: threads, copies or cold. Loads the model, in this process. on_across: told of a
    call that a second instance, loaded after the first was used, answers otherwise than the first did."""
    begin_for(target)
    before = threads_now()
    calls, reseeds, is_slow = known.calls, known.is_random, known.is_slow
    one = load_alike(target)

    def of(subject: Subject) -> list[Callable[[], Any]]:
        return [Call(subject, batch) for batch in calls]

    if kind == "threads":
        warm_up(one, calls)
        return Races(of(one), reseeds=reseeds, is_slow=is_slow)
    if kind == "cold":
        if can_fork(target, before):
            return Races(of(one), isolate=in_fork, reseeds=reseeds, is_slow=is_slow)
        return Races(lambda: of(load_alike(target)), reseeds=reseeds, is_slow=is_slow)

    def pair(first: Subject) -> list[Callable[[], Any]]:
        order = range(len(calls))
        weights = Weights(first.instance)
        of_first = asked_in_order(first, calls, order)
        second = load_alike(target)
        weights.tie(second.instance)
        for one, other in zip(of_first, asked_in_order(second, calls, order), strict=True):
            if one != other:
                on_across(one[0])
        return [call for both in zip(of(first), of(second), strict=True) for call in both]

    made = pair(one)
    # A model that keeps something differs from itself by what came before: then each trial begins alike.
    if known.repeats:
        return Races(made, reseeds=reseeds, is_slow=is_slow, one_each=True)
    if can_fork(target, before):
        return Races(made, isolate=in_fork, reseeds=reseeds, is_slow=is_slow, one_each=True)
    return Races(lambda: pair(load_alike(target)), reseeds=reseeds, is_slow=is_slow, one_each=True)
