"""Ending a block of code from outside: when its time is over, or when nobody waits for it.

Owns: telling our own cancel from everybody else's. Must not know: what is interrupted. asyncio.timeout is not
there in Python 3.10, and wait_for makes a task of each call there.
"""

import asyncio
from types import TracebackType
from typing import Any

from deployments.core.errors import ServingError


class Interruption:
    """Cancels the block that it guards and turns that cancel, and no other, into an error."""

    __slots__ = ("_fired", "_task")

    def __enter__(self) -> None:
        self._fired = False
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task

    def _fire(self) -> None:
        self._fired = True
        self._task.cancel()

    def _stop(self) -> None:
        """Watch no longer: the block has ended."""
        raise NotImplementedError

    def _error(self) -> ServingError:
        """What to raise; made only when it is, since blocks are as frequent as messages."""
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raise our error in the place of our own cancel."""
        self._stop()
        if not self._fired or not isinstance(error, asyncio.CancelledError):
            return
        # Somebody else's cancel that came at the same moment goes first (Python >= 3.11 counts them).
        uncancel = getattr(self._task, "uncancel", None)
        if uncancel is None or uncancel() == 0:
            raise self._error() from None


class TimeLimit(Interruption):
    """`with TimeLimit(5.0, BodyStalled, "it stopped"):` raises BodyStalled("it stopped for 5 s") inside."""

    __slots__ = ("_kind", "_says", "_timeout_s", "_timer")

    def __init__(self, timeout_s: float, kind: type[ServingError], says: str) -> None:
        self._timeout_s, self._kind, self._says = timeout_s, kind, says

    def __enter__(self) -> None:
        super().__enter__()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._fire)

    def _stop(self) -> None:
        self._timer.cancel()

    def _error(self) -> ServingError:
        return self._kind(f"{self._says} for {self._timeout_s:g} s")
