"""A replica to measure in a process of its own: started, asked for looks, ended.

Owns: spawn, the pipe, what the process does between requests (nothing: it waits), its end. Must not know:
what is searched for. Spawned, not forked: each setting of threads and slots starts from the same state.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Protocol

from deployments.core.errors import ServingError
from scripts.tune.inputs import reason_of
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape, Started

START_S = 300.0
"""A process that is not ready after this long never will be."""
HANG_S = 60.0
"""A look may take this much longer than asked for: one batch, and what was queued behind it."""
SWITCH_S = 0.0005
"""As a continuous replica has it (deployments/continuous_batching.py)."""
GC_AFTER_ALLOCATIONS = 50_000
"""As every replica has it (deployments/replica.py)."""


class Replica(Protocol):
    """What the process measures; all on one event loop, one call at a time."""

    async def start(self) -> Started: ...

    async def look(self, point: Point, seconds: float) -> Look: ...

    async def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look: ...

    async def close(self) -> None: ...


class Worker:
    """One such process. It is ready when `ready` has returned."""

    def __init__(self, job: Job, shape: Shape, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, job, shape, batch), daemon=True)
        # Ctrl-C reaches the whole group of processes. It is ours to end them: they start with it blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def ready(self, limit_s: float = START_S) -> Started:
        """Wait until it has loaded and warmed up. Raises CouldNotRun with the reason where it can't."""
        started: Started = self._receive(limit_s, "starting")
        return started

    def ask(self, method: str, *arguments: Any) -> None:
        """Begin "look" or "offer"; `answer` waits for it."""
        self._pipe.send((method, arguments))

    def answer(self, seconds: float) -> Look:
        """Of the measurement that was asked for, of about `seconds`."""
        look: Look = self._receive(seconds + HANG_S, "measured")
        return look

    def close(self) -> None:
        """End it, whatever it does."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _receive(self, limit_s: float, doing: str) -> Any:
        try:
            if not self._pipe.poll(limit_s):
                raise CouldNotRun(
                    f"its process was still {doing} after {limit_s:.0f} s: does the model hang?"
                )
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5.0)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
            hint = " (out of memory?)" if how == "SIGKILL" else ""
            raise CouldNotRun(f"its process ended with {how} while {doing}{hint}") from None
        if kind == "error":
            raise CouldNotRun(value)
        return value


def _main(pipe: "Connection[Any, Any]", job: Job, shape: Shape, batch: int) -> None:
    os.dup2(2, 1)  # what a model prints is no result
    sys.path[:0] = [folder for folder in job.folders if folder not in sys.path]
    try:
        asyncio.run(_serve(pipe, job, shape, batch))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # whoever asked is gone
    finally:
        os._exit(0)  # a thread inside torch would hold up, or abort, an orderly end


async def _serve(pipe: "Connection[Any, Any]", job: Job, shape: Shape, batch: int) -> None:
    try:
        replica = _replica(job, shape, batch)
        pipe.send(("value", await replica.start()))
    except BaseException as error:
        pipe.send(("error", _told(error)))
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_AFTER_ALLOCATIONS)
    while True:
        method, arguments = pipe.recv()  # blocks the loop on purpose: an idle process takes no CPU
        try:
            pipe.send(("value", await getattr(replica, method)(*arguments)))
        except Exception as error:
            pipe.send(("error", _told(error)))


def _replica(job: Job, shape: Shape, batch: int) -> Replica:
    if job.is_continuous:
        from scripts.tune.stepped import Stepped

        sys.setswitchinterval(SWITCH_S)
        return Stepped(job, shape, batch)
    from scripts.tune.batched import Batched

    return Batched(job, shape, batch)


def _told(error: BaseException) -> str:
    """What to show: its text where it is ours, else type, text, and the last place outside of libraries."""
    if isinstance(error, CouldNotRun):
        return str(error)
    if isinstance(error, ServingError):
        return reason_of(error)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and f"{os.sep}deployments{os.sep}" not in frame.filename
        and "scripts" not in frame.filename and not frame.filename.startswith("<")
    ]  # fmt: skip
    own = [
        frame for frame in frames if "asyncio" not in frame.filename and "concurrent" not in frame.filename
    ]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"[:1000]
