"""One dedicated thread per slot: the only place where a model runs.

Owns: the thread, its heartbeat. Must not know: batches, models. `asyncio.to_thread` won't do: its pool
has 5 threads where Ray grants one CPU, and a model may keep thread-local state (CUDA streams, autocast).
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class ModelThread:
    """Runs calls one after the other. Start it once; it ends with the process or by `close`."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def busy_for_s(self) -> float:
        """Seconds the current call has been running; 0 when idle. Any thread may ask."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def call(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Run `function` on the thread; whatever it raises, SystemExit included, comes back here."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if future.done():  # the waiter was cancelled
                return
            if error is None:
                future.set_result(value)  # type: ignore[arg-type]
            elif isinstance(error, Exception):
                future.set_exception(error)
            else:  # a future refuses StopIteration, and SystemExit would end the event loop
                text = f"{type(error).__name__}: {error}" if error.args else type(error).__name__
                future.set_exception(RuntimeError(f"{text} in the model thread"))

        def run() -> None:
            value, error = None, None
            try:
                value = function()
            except BaseException as caught:  # the outermost edge of the thread
                error = RuntimeError(repr(caught)) if isinstance(caught, StopIteration) else caught
            try:
                loop.call_soon_threadsafe(settle, value, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

        self._calls.put(run)
        return future

    def close(self) -> None:
        """Let queued calls finish, then end the thread. Does not wait."""
        self._calls.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end after `close`. A thread that is still inside torch when the interpreter
        ends aborts the process ("terminate called without an active exception")."""
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while (run := self._calls.get()) is not None:
            self._busy_since = time.monotonic()
            run()
            self._busy_since = None
