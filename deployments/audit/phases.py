"""What runs in the audit's fresh processes, one function each: load the model, look, give plain values back.

Owns: what each process does. Must not know: how processes are run, what the answers add up to.
"""

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from deployments.audit import costs, modes, randomness
from deployments.audit.batches import Crowds
from deployments.audit.findings import Property
from deployments.audit.forks import here, in_fork, threads_now
from deployments.audit.instruments import prepare
from deployments.audit.races import Races
from deployments.audit.sameness import digest
from deployments.audit.subject import Subject, calls_of, load
from deployments.audit.target import Batch, Input, Known, Target
from deployments.audit.trials import Trial
from deployments.audit.writes import Write, writes_of
from deployments.runtime.copies import Weights
from deployments.runtime.device import usable_cpus
from deployments.runtime.digest import digest_of
from deployments.runtime.memory import resident_bytes
from deployments.runtime.model_class import ModelClassError

Say = Callable[[Any], None]

SLOW_S = 0.08
"""Of a call: it is warmed up once only, and what takes hundreds of calls to show is not looked for."""
WRITES_S = 1.0
REPEATS = 6
MOST_ANSWERS = 500
"""Of a process that asks in one order: what happens every hundredth call is found."""
LATEST = 4.0
"""Times its share a search may take for the least number of trials."""
FEW_COPIES = 3
"""The least number for copies of a model that keeps nothing: what is said of threads in one instance holds
for them, too."""


def alone(say: Say, target: Target) -> dict[str, Any]:
    """Of one instance in one thread: its calls, randomness, modes."""
    _begin(target)
    threads_before = threads_now()
    subject = _load(target)
    weights = digest_of(subject.instance)
    known = known_of(subject)
    isolate = in_fork if _can_fork(target, threads_before) else here
    call = _Call(subject, known.calls[0])
    say("deterministic")
    deterministic = randomness.check(call, isolate)
    say("eval_mode")
    return {
        "known": known,
        "deterministic": deterministic,
        "eval_mode": modes.check(subject.instance, call),
        "weights": weights,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def writes(say: Say, target: Target) -> dict[str, Any]:
    """What the calls write, and what the first one of all wrote besides; the weights of an instance that is
    made from another seed than all others."""
    _begin(target)
    randomness.seed_all(1)
    subject = load(target)
    weights = digest_of(subject.instance)
    firsts = writes_of(_Call(subject, (Input(0),)))
    calls = calls_of(subject)
    if not _is_slow(subject, calls):
        _warm(subject, calls)
    found = _writes_of(subject, calls)
    return {
        "writes": [write.as_json() for write in found],
        "first_writes": [write.as_json() for write in firsts if write not in found],
        "weights": weights,
    }


def search(say: Say, target: Target, known: Known, kind: str, seed: int, seconds: float) -> dict[str, Any]:
    """Of `kind` threads (two calls and more in one warmed-up instance), copies (across two instances, as a
    pool makes them) or cold (the first calls of an instance): {"found": what a trial found, as JSON, or None;
    "across": a call that the second copy answers otherwise than the first did, or None}.
    """
    across: list[int] = []
    races = races_of(target, known, kind, on_across=across.append)
    share_suffices = kind == "copies" and known.repeats
    enough = FEW_COPIES if share_suffices else known.least_trials
    began = time.monotonic()

    def has_time() -> bool:
        spent_s = time.monotonic() - began
        if known.is_slow and races.runs >= enough:
            return False
        return spent_s < seconds or (races.runs < enough and spent_s < LATEST * seconds)

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
        found = races.run(Trial.from_json(trial))
    else:
        seed, runs = prefix
        found = races.search(seed=seed, has_time=lambda: races.runs < runs)
    return None if found is None else found.as_json()


def orders(
    say: Say, target: Target, known: Known, begins: Sequence[int], seconds: float
) -> list[list[tuple[int, str]]]:
    """Answers of the calls in orders that begin with the calls `begins`, each in a process of its own: forks
    of this one, which has loaded the model; where that can't be, the first order's alone.
    """
    _begin(target)
    threads_before = threads_now()
    subject = _load(target)
    each = [partial(answers, subject, known, first, seconds) for first in begins]
    return [in_fork(one) for one in each] if _can_fork(target, threads_before) else [each[0]()]


def answers(subject: Subject, known: Known, first: int, seconds: float) -> list[tuple[int, str]]:
    """(call, digest of its answer) in the order that begins with call `first`: one round and back at least,
    more while there is time.

    Nothing is called before the first, since what it leaves may saturate (the largest value seen).
    """
    calls = known.calls
    order = [(first + number) % len(calls) for number in range(len(calls))]
    found = _round(subject, calls, order)
    found += [(number, _asked(subject, calls[number])) for number in reversed(order)]
    deadline = time.monotonic() + (0.0 if known.is_slow else seconds)
    for number in islice(cycle((*order, *reversed(order), *(order[:1] * REPEATS))), MOST_ANSWERS):
        if time.monotonic() < deadline:
            found.append((number, _asked(subject, calls[number])))
    return found


def _round(subject: Subject, calls: Sequence[Batch], order: Sequence[int]) -> list[tuple[int, str]]:
    """(call, digest of its answer), each warmed up just before."""
    found = []
    for number in order:
        _warm(subject, calls[number : number + 1])
        found.append((number, _asked(subject, calls[number])))
    return found


def _asked(subject: Subject, batch: Batch) -> str:
    randomness.seed_all(0)
    return digest(subject.call(batch))


def batches(say: Say, target: Target, known: Known, seconds: float) -> dict[str, Property]:
    """`batch_invariant` and `padding_invariant`."""
    _begin(target)
    threads_before = threads_now()
    subject = _load(target)
    isolate = in_fork if _can_fork(target, threads_before) else here
    if isolate is here and not known.repeats:
        unknown = Property(None, "can't be told apart: answers depend on earlier calls anyway")
        return {"batch_invariant": unknown, "padding_invariant": unknown}
    if isolate is here:
        _warm(subject, known.calls)
    deadline = time.monotonic() + seconds
    crowds = Crowds(
        subject, is_random=known.is_random, isolate=isolate, has_time=lambda: time.monotonic() < deadline
    )
    say("batch_invariant")
    mates = crowds.check_mates()
    say("padding_invariant")
    return {"batch_invariant": mates, "padding_invariant": crowds.check_padding()}


def batches_alone(say: Say, target: Target, seconds: float) -> dict[str, Property]:
    """The same without a phase before it: what a variant must hold (variant.py)."""
    _begin(target)
    return batches(say, target, known_of(_load(target)), seconds)


def measured(say: Say, target: Target, known: Known, seconds: float, is_shareable: bool) -> dict[str, Any]:
    """Memory and speed-ups, with all of the machine's cores."""
    cores = usable_cpus()
    torch.set_num_threads(cores)
    before = resident_bytes()
    began = time.monotonic()
    first = _load(target)
    load_s = time.monotonic() - began
    weights = Weights(first.instance)
    _warm(first, known.calls)
    if torch.device(target.device).type == "cuda":
        instance_bytes = torch.cuda.memory_allocated()
    else:
        instance_bytes = max(0, resident_bytes() - before)
    say("a second instance")
    second = _load(target)
    weights.tie(second.instance)
    _warm(second, known.calls)
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


def _load(target: Target) -> Subject:
    """Equal seeds for each instance: one that makes its own weights makes the same ones."""
    randomness.seed_all(0)
    return load(target)


def _begin(target: Target) -> None:
    """In every process. Raises ModelClassError."""
    if torch.device(target.device).type == "cuda" and not torch.cuda.is_available():
        raise ModelClassError(
            f"--device {target.device}: torch {torch.__version__} finds no GPU here; leave --device out to "
            "audit on the CPU"
        )
    begin()


def begin() -> None:
    """One thread, nothing left to be imported in a trial."""
    torch.set_num_threads(1)
    prepare()


def _warm(subject: Subject, calls: Sequence[Batch]) -> None:
    for batch in calls:
        began = time.monotonic()
        subject.call(batch)
        if time.monotonic() - began < SLOW_S:
            subject.call(batch)


def _writes_of(subject: Subject, calls: Sequence[Batch]) -> list[Write]:
    """Of the first call at least, of the others while there is time: a large model's take a second each."""
    found: dict[Write, None] = {}
    began = time.monotonic()
    for batch in calls:
        if batch is calls[0] or time.monotonic() - began < WRITES_S:
            found |= dict.fromkeys(writes_of(_Call(subject, batch)))
    return list(found)


def known_of(subject: Subject) -> Known:
    """The calls of an instance, which is warmed up then, and how they behave in one thread."""
    calls = calls_of(subject)
    is_slow = _is_slow(subject, calls)
    if not is_slow:
        _warm(subject, calls)
    is_random = randomness.is_random(_Call(subject, calls[0]))
    return Known(tuple(calls), is_random, _repeats(subject, calls), is_slow)


def _is_slow(subject: Subject, calls: Sequence[Batch]) -> bool:
    """Of calls that have been made once."""
    began = time.monotonic()
    subject.call(calls[0])
    return time.monotonic() - began > SLOW_S


def _repeats(subject: Subject, calls: Sequence[Batch]) -> bool:
    """Whether the calls, made again in another order, give the same: nothing is kept that matters."""

    first = [_asked(subject, batch) for batch in calls]
    return first == [_asked(subject, batch) for batch in reversed(calls)][::-1]


def races_of(
    target: Target, known: Known, kind: str, *, on_across: Callable[[int], None] = lambda call: None
) -> Races:
    """The races of a kind: threads, copies or cold. Loads the model, in this process. on_across: told of a
    call that a second instance, loaded after the first was used, answers otherwise than the first did."""
    _begin(target)
    before = threads_now()
    calls, reseeds, is_slow = known.calls, known.is_random, known.is_slow
    one = _load(target)

    def of(subject: Subject) -> list[Callable[[], Any]]:
        return [_Call(subject, batch) for batch in calls]

    if kind == "threads":
        _warm(one, calls)
        return Races(of(one), reseeds=reseeds, is_slow=is_slow)
    if kind == "cold":
        if _can_fork(target, before):
            return Races(of(one), isolate=in_fork, reseeds=reseeds, is_slow=is_slow)
        return Races(lambda: of(_load(target)), reseeds=reseeds, is_slow=is_slow)

    def pair(first: Subject) -> list[Callable[[], Any]]:
        order = range(len(calls))
        weights = Weights(first.instance)
        of_first = _round(first, calls, order)
        second = _load(target)
        weights.tie(second.instance)
        for one, other in zip(of_first, _round(second, calls, order), strict=True):
            if one != other:
                on_across(one[0])
        return [call for both in zip(of(first), of(second), strict=True) for call in both]

    made = pair(one)
    # A model that keeps something differs from itself by what came before: then each trial begins alike.
    if known.repeats:
        return Races(made, reseeds=reseeds, is_slow=is_slow, one_each=True)
    if _can_fork(target, before):
        return Races(made, isolate=in_fork, reseeds=reseeds, is_slow=is_slow, one_each=True)
    return Races(lambda: pair(_load(target)), reseeds=reseeds, is_slow=is_slow, one_each=True)


def _can_fork(target: Target, threads_before: int) -> bool:
    """The model has started no thread, which a fork would lack, and uses no GPU."""
    return threads_now() == threads_before >= 1 and torch.device(target.device).type == "cpu"
