"""One phase of the audit in a fresh process, with a time limit; what it said last if it dies.

Owns: how a process begins and ends, the pipe, the limit. Must not know: phases, torch. A process of its own
for each: the audit pollutes what it touches (default dtypes, module globals), and racing a scripted module's
attribute ends the process. Never forked from the caller, which may have threads, a model and a GPU, but from
a server that has imported torch and nothing else (nursery.py); where that can't be, spawned.
"""

import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from deployments.core.errors import ModelFailed

_SPAWN = multiprocessing.get_context("spawn")
_FORKSERVER = multiprocessing.get_context("forkserver")
_NURSERY = "deployments.audit.nursery"
_FORKSERVER.set_forkserver_preload([_NURSERY])
POLL_S = 0.2
"""How soon a phase hears that the audit is stopped."""


def start_server(libraries: Sequence[str] = ()) -> None:
    """What phases are forked from: it imports torch, and these, while the caller goes on. Once a process;
    what is asked for later is ignored.
    """
    _FORKSERVER.set_forkserver_preload([_NURSERY, *libraries])
    forkserver.ensure_running()


@dataclass(frozen=True, slots=True)
class Outcome:
    """value: what the phase returned, with error "". last: the last thing it said, which tells where it
    died.
    """

    value: Any = None
    error: str = ""
    last: Any = None
    died: bool = False


def run_phase(
    function: str,
    *arguments: Any,
    limit_s: float,
    is_forked: bool = True,
    core: int | None = None,
    stopped: threading.Event | None = None,
    on_said: Callable[[Any], None] = lambda said: None,
) -> Outcome:
    """Run "module:function" as function(say, *arguments) in a process of its own; never raises what it
    raises.

    limit_s: it is killed then, and soon after `stopped` is set. is_forked: of the server that has torch
    already; False for what uses a GPU. core: it runs on this one alone, which makes threads that take turns
    twice as fast: none is woken up on another core. `say(anything that pickles)` tells how far it is.
    """
    context = _FORKSERVER if is_forked else _SPAWN
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(theirs, function, arguments, core), daemon=True)
    process.start()
    theirs.close()
    last: Any = None
    deadline = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline:
            if stopped is not None and stopped.is_set():
                return Outcome(error="the audit was stopped", last=last)
            if not ours.poll(POLL_S):
                continue
            kind, value = ours.recv()
            if kind == "value":
                return Outcome(value, last=last)
            if kind == "error":
                return Outcome(error=value, last=last)
            last = value
            on_said(value)
        return Outcome(error=f"it took longer than {limit_s:.0f} s", last=last)
    except EOFError:
        process.join(5.0)
        return Outcome(error=f"its process ended with {_name_of(process.exitcode)}", last=last, died=True)
    finally:
        _kill_group(process.pid)
        process.kill()
        process.join()
        ours.close()


def _kill_group(leader: int | None) -> None:
    try:
        if leader is not None:
            os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or not begun to be a group
        pass


def _name_of(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"


def cores() -> list[int | None]:
    """That this process may use; [None]: the system doesn't say (not Linux)."""
    return list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]


def _main(pipe: Connection, function: str, arguments: tuple[Any, ...], core: int | None) -> None:
    os.setpgrp()  # with all that it starts: what is left of it ends with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if core is not None:
        os.sched_setaffinity(0, {core})
    os.dup2(2, 1)  # what a model prints is no part of the report
    try:
        module, _, name = function.partition(":")
        value = getattr(importlib.import_module(module), name)(
            lambda said: pipe.send(("said", said)), *arguments
        )
        pipe.send(("value", value))
    except BaseException as error:
        pipe.send(("error", _told(error)))


def _end_with_parent() -> None:
    """However that ended: SIGKILL runs no handler."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _kill_group(os.getpid())


def _told(error: BaseException) -> str:
    """Its type and text, and the last place outside of libraries; of what the model raised, not of our name
    for that."""
    if isinstance(error, ModelFailed) and error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and "/deployments/" not in frame.filename
    ]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"[:1000]
