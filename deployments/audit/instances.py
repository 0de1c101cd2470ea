"""An instance in one of the audit's processes: made, warmed up, called; how its calls behave.

Owns: that each phase makes and calls it alike. Must not know: what phases ask.
"""

import ctypes
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from deployments.audit import randomness
from deployments.audit.forks import threads_now
from deployments.audit.instruments import prepare
from deployments.audit.sameness import digest
from deployments.audit.subject import Subject, calls_of, load
from deployments.audit.target import Batch, Known, Target
from deployments.runtime.model_class import ModelClassError

SLOW_S = 0.08
"""Of a call: it is warmed up once only, and what takes hundreds of calls to show is not looked for."""

_M_PERTURB = -6
"""Of mallopt(3)."""


class Call:
    """One call of an instance, as races take it."""

    def __init__(self, subject: Subject, batch: Batch) -> None:
        self.instance, self._subject, self._batch = subject.instance, subject, batch

    def __call__(self) -> Any:
        return self._subject.call(self._batch)


def load_alike(target: Target) -> Subject:
    """Equal seeds for each instance: one that makes its own weights makes the same ones."""
    randomness.seed_all(0)
    return load(target)


def begin_for(target: Target) -> None:
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


def fill_new_memory() -> None:
    """What is allocated from now on is filled with a pattern. A scratch buffer of `torch.empty` holds other
    numbers than elsewhere then, and what is made at each load anew is told from weights. glibc alone.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_PERTURB, 0x5A)


def warm_up(subject: Subject, calls: Sequence[Batch]) -> None:
    for batch in calls:
        began = time.monotonic()
        subject.call(batch)
        if time.monotonic() - began < SLOW_S:
            subject.call(batch)


def asked_in_order(subject: Subject, calls: Sequence[Batch], order: Sequence[int]) -> list[tuple[int, str]]:
    """(call, digest of its answer), each warmed up just before."""
    found = []
    for number in order:
        warm_up(subject, calls[number : number + 1])
        found.append((number, asked(subject, calls[number])))
    return found


def asked(subject: Subject, batch: Batch) -> str:
    randomness.seed_all(0)
    return digest(subject.call(batch))


def known_of(subject: Subject) -> Known:
    """The calls of an instance, which is warmed up then, and how they behave in one thread."""
    calls, is_slow = warm_calls_of(subject)
    is_random = randomness.is_random(Call(subject, calls[0]))
    return Known(tuple(calls), is_random, _repeats(subject, calls), is_slow)


def warm_calls_of(subject: Subject) -> tuple[list[Batch], bool]:
    """(the calls of an instance, which is warmed up then, whether they are slow)."""
    calls = calls_of(subject)
    is_slow = _is_slow(subject, calls)
    if not is_slow:
        warm_up(subject, calls)
    return calls, is_slow


def _is_slow(subject: Subject, calls: Sequence[Batch]) -> bool:
    """Of calls that have been made once: the quickest of three, since any may be held up."""
    for _ in range(3):
        began = time.monotonic()
        subject.call(calls[0])
        if time.monotonic() - began < SLOW_S:
            return False
    return True


def _repeats(subject: Subject, calls: Sequence[Batch]) -> bool:
    """Whether the calls, made again in another order, give the same: nothing is kept that matters."""
    first = [asked(subject, batch) for batch in calls]
    return first == [asked(subject, batch) for batch in reversed(calls)][::-1]


def can_fork(target: Target, threads_before: int) -> bool:
    """The model has started no thread, which a fork would lack, and uses no GPU."""
    return threads_now() == threads_before >= 1 and torch.device(target.device).type == "cpu"
