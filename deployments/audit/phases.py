"""What runs in the audit's fresh processes, one function each: load the model, look, give plain values back.

Owns: what each process does. Must not know: how processes are run, what the answers add up to.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from deployments.audit import costs, modes, randomness
from deployments.audit.batches import Crowds
from deployments.audit.findings import Property
from deployments.audit.instruments import prepare
from deployments.audit.races import Races, Trial
from deployments.audit.sameness import digest
from deployments.audit.subject import Subject, calls_of, load
from deployments.audit.target import LEAST_TRIALS, Batch, Input, Target
from deployments.audit.writes import writes_of
from deployments.runtime.copies import Weights, digest_of
from deployments.runtime.device import usable_cpus

Say = Callable[[Any], None]

WARM_UPS = 2
REPEATS = 6
LATEST = 4.0
"""Times its share a search may take for the least number of trials."""


def alone(say: Say, target: Target) -> dict[str, Any]:
    """Of one instance in one thread: randomness, modes, writes, and what it is made of."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    subject = load(target)
    weights = digest_of(subject.instance)
    firsts = writes_of(_Call(subject, (Input(0),)))  # what the first call of a fresh instance writes
    torch.manual_seed(0)
    made_at_load = digest_of(load(target).instance) != weights
    subject, calls = _loaded(target)
    call = _Call(subject, calls[0])
    say("deterministic")

    def fresh() -> Callable[[], Any]:
        torch.manual_seed(0)
        return _Call(load(target), calls[0])

    deterministic = randomness.check(call, fresh)
    say("eval_mode")
    eval_mode = modes.check(subject.instance, call)
    say("writes")
    writes = dict.fromkeys(write for batch in calls for write in writes_of(_Call(subject, batch)))
    return {
        "deterministic": deterministic,
        "eval_mode": eval_mode,
        "writes": [write.as_json() for write in writes],
        "first_writes": [write.as_json() for write in firsts if write not in writes],
        "batches": calls,
        "weights": None if made_at_load else weights,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def threads(say: Say, target: Target, seed: int, seconds: float) -> dict[str, Any] | None:
    """`thread_safe`: two calls and more in one warmed-up instance."""
    return _search(say, target, "threads", seed, seconds)


def copies(say: Say, target: Target, seed: int, seconds: float) -> dict[str, Any] | None:
    """`copy_safe`: the same across two instances, as a pool makes them."""
    return _search(say, target, "copies", seed, seconds)


def cold(say: Say, target: Target, seed: int, seconds: float) -> dict[str, Any] | None:
    """`cold_start_safe`: the first calls of an instance overlap; a fresh instance for each trial."""
    return _search(say, target, "cold", seed, seconds)


def replay(say: Say, target: Target, kind: str, trial: dict[str, Any]) -> dict[str, Any] | None:
    """One trial again, as phase `kind` made it: what it found, with all of its steps."""
    torch.set_num_threads(1)
    found = races_of(target, kind).run(Trial.from_json(trial))
    return None if found is None else found.as_json()


def orders(say: Say, target: Target, calls: list[Batch], first: int, seconds: float) -> list[tuple[int, str]]:
    """Answers of the calls in an order that begins with call `first`: (call, digest), each warmed up just
    before. One round and back at least, more while there is time.

    calls: found by another process; here none is made before the first, since what it leaves may saturate
    (the largest value seen).
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    subject = load(target)
    order = [(first + number) % len(calls) for number in range(len(calls))]
    answers: list[tuple[int, str]] = []

    def ask(number: int) -> None:
        randomness.seed_all(0)
        answers.append((number, digest(subject.call(calls[number]))))

    for number in order:
        for _ in range(WARM_UPS):
            subject.call(calls[number])
        ask(number)
    for number in reversed(order):
        ask(number)
    deadline = time.monotonic() + seconds
    for number in (*order, *reversed(order), *(order[:1] * REPEATS)):
        if time.monotonic() < deadline:
            ask(number)
    return answers


def batches(say: Say, target: Target, seconds: float) -> dict[str, Property]:
    """`batch_invariant` and `padding_invariant`."""
    torch.set_num_threads(1)
    subject, calls = _loaded(target)
    deadline = time.monotonic() + seconds
    crowds = Crowds(
        subject, is_random=_is_random(subject, calls), has_time=lambda: time.monotonic() < deadline
    )
    say("batch_invariant")
    mates = crowds.check_mates()
    say("padding_invariant")
    return {"batch_invariant": mates, "padding_invariant": crowds.check_padding()}


def measured(say: Say, target: Target, seconds: float, is_shareable: bool) -> dict[str, Any]:
    """Memory and speed-ups, with all of the machine's cores."""
    cores = usable_cpus()
    torch.set_num_threads(cores)
    before = costs.resident_bytes()
    began = time.monotonic()
    first = load(target)
    weights = Weights(first.instance)
    calls = calls_of(first)
    _warm(first, calls)
    load_s = time.monotonic() - began
    if torch.device(target.device).type == "cuda":
        instance_bytes = torch.cuda.memory_allocated()
    else:
        instance_bytes = max(0, costs.resident_bytes() - before)
    say("a second instance")
    second = load(target)
    weights.tie(second.instance)
    _warm(second, calls)
    say("speed")
    found = costs.Costs((first, second), cores, seconds)
    return {
        "instance_bytes": instance_bytes, "load_s": round(load_s, 2), **found.memory(target.device),
        **found.speed(is_shareable=is_shareable), "cores": cores,
    }  # fmt: skip


class _Call:
    """One call of an instance, as races take it."""

    def __init__(self, subject: Subject, batch: Batch) -> None:
        self.instance, self._subject, self._batch = subject.instance, subject, batch

    def __call__(self) -> Any:
        return self._subject.call(self._batch)


def _loaded(target: Target) -> tuple[Subject, list[Batch]]:
    """An instance, warmed up with each call, and the calls."""
    prepare()
    torch.manual_seed(0)
    subject = load(target)
    calls = calls_of(subject)
    _warm(subject, calls)
    return subject, calls


def _warm(subject: Subject, calls: list[Batch]) -> None:
    for batch in calls:
        for _ in range(WARM_UPS):
            subject.call(batch)


def _is_random(subject: Subject, calls: list[Batch]) -> bool:
    return randomness.is_random(_Call(subject, calls[0]))


def _repeats(subject: Subject, calls: list[Batch]) -> bool:
    """Whether the calls, made again in another order, give the same: nothing is kept that matters."""
    randomness.seed_all(0)

    def answers(order: list[int]) -> dict[int, str]:
        found = {}
        for number in order:
            randomness.seed_all(0)
            found[number] = digest(subject.call(calls[number]))
        return found

    order = list(range(len(calls)))
    return answers(order) == answers(order[::-1]) == answers(order)


def _search(say: Say, target: Target, kind: str, seed: int, seconds: float) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    races = races_of(target, kind)
    began = time.monotonic()

    def has_time() -> bool:
        spent_s = time.monotonic() - began
        return spent_s < seconds or (races.runs < LEAST_TRIALS and spent_s < LATEST * seconds)

    races.on_trial = lambda trial: say(trial.as_json())
    found = races.search(seed=seed, has_time=has_time)
    say(races.runs)
    return None if found is None else found.as_json()


def races_of(target: Target, kind: str) -> Races:
    """The races of phase `kind`: threads, copies or cold. Loads the model, in this process."""
    subject, calls = _loaded(target)
    reseeds = _is_random(subject, calls)
    if kind == "threads":
        return Races([_Call(subject, batch) for batch in calls], reseeds=reseeds)

    def fresh() -> list[Callable[[], Any]]:
        one = load(target)
        return [_Call(one, batch) for batch in calls]

    def pair() -> list[Callable[[], Any]]:
        first = load(target)
        weights = Weights(first.instance)
        two = (first, load(target))
        weights.tie(two[1].instance)
        for one in two:
            _warm(one, calls)
        return [_Call(one, batch) for batch in calls for one in two]

    if kind == "cold":
        return Races(fresh, reseeds=reseeds)
    # A model that keeps something differs from itself by what came before: then each trial has its own pair.
    return Races(pair() if _repeats(subject, calls) else pair, reseeds=reseeds, one_each=True)
