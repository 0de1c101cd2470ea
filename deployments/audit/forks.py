"""Work in a fork of this process: whatever it changes, here all stays as it was.

Owns: the fork and the way back. Must not know: what is run. For what happens only once (an instance's first
calls) and for models that keep something: loading anew would cost a second and more each time, and would not
undo what a module's globals keep. Only where all threads are Python's main one and sleepers: a fork has none
of its parent's threads, so a model with a thread pool would wait for ever in it.
"""

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Failed(Exception):
    """What the work raised, as text."""


class CantCross(Failed):
    """What the work returned can't be brought back: it can't be pickled."""


Isolate = Callable[[Callable[[], Any]], Any]
"""Runs what it is given, where nothing that it changes stays (or, where that can't be, here)."""


def here(work: Callable[[], T]) -> T:
    """Runs it in this process."""
    return work()


def threads_now() -> int:
    """Of this process, C++'s included; -1 where the system doesn't say (not Linux)."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return -1


def in_fork(work: Callable[[], T]) -> T:
    """What the work returns, by pickle. Raises Failed, or CantCross; where the fork dies, this process dies
    as it did."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: see above
        child = os.fork()
    if not child:
        os.close(reader)
        _report(work, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not told:
        _die(code)
    error, value = pickle.loads(told)
    if error is not None:
        raise error(value)
    found: T = value
    return found


def _report(work: Callable[[], Any], writer: int) -> None:
    try:
        value = work()
    except BaseException as error:
        told = pickle.dumps((Failed, _text_of(error)))
    else:
        try:
            told = pickle.dumps((None, value))
        except Exception as error:
            told = pickle.dumps((CantCross, _text_of(error)))
    with os.fdopen(writer, "wb") as stream:
        stream.write(told)
    os._exit(0)


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _die(code: int) -> None:
    sys.stderr.flush()
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)
