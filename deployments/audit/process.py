"""One phase of the audit in a fresh process, with a time limit; what it said last if it dies.

Owns: spawn, the pipe, the limit. Must not know: phases, torch. Spawned, not forked: the audit pollutes what
it touches (default dtypes, module globals), and racing a scripted module's attribute ends the process.
"""

import importlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")


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
    function: str, *arguments: Any, limit_s: float, on_said: Callable[[Any], None] = lambda said: None
) -> Outcome:
    """Run "module:function" as function(say, *arguments) in a process of its own; never raises what it
    raises.

    limit_s: it is killed then. `say(anything that pickles)` tells how far it is.
    """
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_main, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    last: Any = None
    deadline = time.monotonic() + limit_s
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
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
        process.kill()
        process.join()
        ours.close()


def _name_of(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"


def _main(pipe: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    try:
        module, _, name = function.partition(":")
        value = getattr(importlib.import_module(module), name)(
            lambda said: pipe.send(("said", said)), *arguments
        )
        pipe.send(("value", value))
    except BaseException as error:
        pipe.send(("error", _told(error)))


def _told(error: BaseException) -> str:
    """Its type and text, and the last place outside of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and "/deployments/" not in frame.filename
    ]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"[:1000]
