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
from deployments.audit.forks import CantCross, Isolate, here, in_fork, threads_now
from deployments.audit.instances import (
    Call,
    asked,
    asked_in_order,
    begin_for,
    can_fork,
    fill_new_memory,
    known_of,
    load_alike,
    warm_calls_of,
    warm_up,
)
from deployments.audit.subject import Subject, load
from deployments.audit.target import Batch, Input, Known, Target
from deployments.audit.writes import Write, writes_of
from deployments.core.machine import usable_cpus
from deployments.runtime.copies import Weights
from deployments.runtime.digest import digest_of
from deployments.runtime.memory import resident_bytes

Say = Callable[[Any], None]

WRITES_S = 1.0
REPEATS = 6
MOST_ANSWERS = 500
"""Of a process that asks in one order: what happens every hundredth call is found."""


def alone(say: Say, target: Target) -> dict[str, Any]:
    """Of one instance in one thread: its calls, randomness, modes."""
    begin_for(target)
    threads_before = threads_now()
    subject = load_alike(target)
    weights = digest_of(subject.instance)
    known = known_of(subject)
    isolate = in_fork if can_fork(target, threads_before) else here
    call = Call(subject, known.calls[0])
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
    made from another seed than all others, in memory that holds something else."""
    begin_for(target)
    fill_new_memory()
    randomness.seed_all(1)
    subject = load(target)
    weights = digest_of(subject.instance)
    firsts = writes_of(Call(subject, (Input(0),)))
    calls, _ = warm_calls_of(subject)
    found = _writes_of(subject, calls)
    return {
        "writes": [write.as_json() for write in found],
        "first_writes": [write.as_json() for write in firsts if write not in found],
        "weights": weights,
    }


def orders(
    say: Say, target: Target, known: Known, begins: Sequence[int], seconds: float
) -> list[list[tuple[int, str]]]:
    """Answers of the calls in orders that begin with the calls `begins`, each in a process of its own: forks
    of this one, which has loaded the model; where that can't be, the first order's alone.
    """
    begin_for(target)
    threads_before = threads_now()
    subject = load_alike(target)
    each = [partial(answers, subject, known, first, seconds) for first in begins]
    return [in_fork(one) for one in each] if can_fork(target, threads_before) else [each[0]()]


def answers(subject: Subject, known: Known, first: int, seconds: float) -> list[tuple[int, str]]:
    """(call, digest of its answer) in the order that begins with call `first`: one round and back at least,
    more while there is time.

    Nothing is called before the first, since what it leaves may saturate (the largest value seen).
    """
    calls = known.calls
    order = [(first + number) % len(calls) for number in range(len(calls))]
    found = asked_in_order(subject, calls, order)
    found += [(number, asked(subject, calls[number])) for number in reversed(order)]
    deadline = time.monotonic() + (0.0 if known.is_slow else seconds)
    for number in islice(cycle((*order, *reversed(order), *(order[:1] * REPEATS))), MOST_ANSWERS):
        if time.monotonic() < deadline:
            found.append((number, asked(subject, calls[number])))
    return found


def batches(say: Say, target: Target, known: Known, seconds: float) -> dict[str, Property]:
    """`batch_invariant` and `padding_invariant`."""
    begin_for(target)
    threads_before = threads_now()
    subject = load_alike(target)
    isolate = in_fork if can_fork(target, threads_before) else here
    try:
        return _batches(say, subject, known, seconds, isolate)
    except CantCross:
        return _batches(say, subject, known, seconds, here)


def _batches(
    say: Say, subject: Subject, known: Known, seconds: float, isolate: Isolate
) -> dict[str, Property]:
    if isolate is here and not known.repeats:
        unknown = Property(None, "can't be told apart: answers depend on earlier calls anyway")
        return {"batch_invariant": unknown, "padding_invariant": unknown}
    if isolate is here:
        warm_up(subject, known.calls)
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
    begin_for(target)
    return batches(say, target, known_of(load_alike(target)), seconds)


def measured(say: Say, target: Target, known: Known, seconds: float, is_shareable: bool) -> dict[str, Any]:
    """Memory and speed-ups, with all of the machine's cores."""
    cores = usable_cpus()
    torch.set_num_threads(cores)
    before = resident_bytes()
    began = time.monotonic()
    first = load_alike(target)
    load_s = time.monotonic() - began
    weights = Weights(first.instance)
    warm_up(first, known.calls)
    if torch.device(target.device).type == "cuda":
        instance_bytes = torch.cuda.memory_allocated()
    else:
        instance_bytes = max(0, resident_bytes() - before)
    say("a second instance")
    second = load_alike(target)
    weights.tie(second.instance)
    warm_up(second, known.calls)
    say("speed")
    found = costs.Costs((first, second), cores, seconds)
    return {
        "instance_bytes": instance_bytes, "load_s": round(load_s, 2), **found.memory(target.device),
        **found.speed(is_shareable=is_shareable), "cores": cores,
    }  # fmt: skip


def _writes_of(subject: Subject, calls: Sequence[Batch]) -> list[Write]:
    """Of the first call at least, of the others while there is time: a large model's take a second each."""
    found: dict[Write, None] = {}
    began = time.monotonic()
    for batch in calls:
        if batch is calls[0] or time.monotonic() - began < WRITES_S:
            found |= dict.fromkeys(writes_of(Call(subject, batch)))
    return list(found)
