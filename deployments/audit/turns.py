"""Threads that take turns at pause points, one at a time, in the order that a schedule says.

Owns: whose turn it is; noticing that a thread waits for a lock that a paused one holds. Must not know:
torch, models, what a point is. A thread that waits for a lock reaches no point, uses no CPU and sleeps: its
own clock and state tell it from one that computes, where the wall clock would not on a busy machine.
"""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.audit.schedules import Schedule

POLL_S = 0.005
BLOCKED_AFTER_S = 0.03
"""Asleep without CPU time and without a point for so long: it waits for a lock. A call that sleeps looks the
same, and is then interleaved as the machine likes."""
STUCK_AFTER_S = 5.0
"""Nobody goes on: a deadlock. The threads are left behind; the process is the audit's own."""


class Stuck(Exception):
    """The threads wait for each other; the text says at which points."""


@dataclass(frozen=True, slots=True)
class Point:
    """One pause: thread `thread` was about to do `what`."""

    thread: int
    what: str


@dataclass(slots=True)
class Ended:
    """What became of one call: its value, or what it raised."""

    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True)
class _Thread:
    call: Callable[[], Any]
    ended: Ended = field(default_factory=Ended)
    ident: int = 0
    native_id: int = 0
    has_begun: bool = False
    is_done: bool = False
    is_blocked: bool = False
    is_waiting: bool = False  # for its turn: asleep, but not for a lock of the model's
    last: str = ""


class Turns:
    """One interleaved run of a few calls. `points`: all pauses, in the order they happened."""

    def __init__(self, schedule: Schedule) -> None:
        self.points: list[Point] = []
        self._schedule = schedule
        self._changed = threading.Condition()
        self._threads: list[_Thread] = []
        self._counts: list[int] = []
        self._numbers: dict[int, int] = {}  # thread ident -> its number
        self._owner = 0
        self._all_done = threading.Event()

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Ended]:
        """Run each call on a thread of its own, thread 0 first; what came of them, in order. Raises Stuck.

        Garbage is collected before, not meanwhile: it may run anybody's code, at any point of any thread.
        """
        gc.collect(0)
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return self._run(calls)
        finally:
            if was_enabled:
                gc.enable()

    def _run(self, calls: Sequence[Callable[[], Any]]) -> list[Ended]:
        self._threads = [_Thread(call) for call in calls]
        self._counts = [0] * len(calls)
        for number in range(len(calls)):
            threading.Thread(target=self._live, args=(number,), daemon=True).start()
        self._watch()
        return [thread.ended for thread in self._threads]

    def pause(self, what: str) -> None:
        """A pause point of the calling thread. Threads that are none of ours pass."""
        number = self._numbers.get(threading.get_ident())
        if number is None:
            return
        with self._changed:
            self._wait_for_turn(number)  # at once, but after a lock
            self._counts[number] += 1
            self._threads[number].last = what
            self.points.append(Point(number, what))
            following = self._schedule.next(number, self._counts)
            if following != number and self._may_go_on(following):
                self._give(following)
                self._wait_for_turn(number)

    # -- a thread's life ------------------------------------------------------------------------------

    def _live(self, number: int) -> None:
        thread = self._threads[number]
        with self._changed:
            thread.ident, thread.native_id = threading.get_ident(), threading.get_native_id()
            self._numbers[thread.ident] = number
            self._wait_for_turn(number)
            thread.has_begun = True
        try:
            thread.ended.value = thread.call()
        except BaseException as error:
            thread.ended.error = error
        with self._changed:
            thread.is_done = True
            del self._numbers[thread.ident]
            if self._owner == number:
                self._give_to_any()
            if all(other.is_done for other in self._threads):
                self._all_done.set()

    def _wait_for_turn(self, number: int) -> None:
        thread = self._threads[number]
        if thread.is_blocked:  # the lock was given back
            thread.is_blocked = False
            if self._owner == -1:
                self._owner = number
        thread.is_waiting = True
        self._changed.wait_for(lambda: self._owner == number)
        thread.is_waiting = False

    # -- whose turn -----------------------------------------------------------------------------------

    def _may_go_on(self, number: int) -> bool:
        return not self._threads[number].is_done and not self._threads[number].is_blocked

    def _give(self, number: int) -> None:
        self._owner = number
        self._changed.notify_all()

    def _give_to_any(self) -> None:
        """Who paused last of those that began, else the next; -1 where all that are left wait for locks."""
        able = [n for n in range(len(self._threads)) if self._may_go_on(n)]
        begun = [n for n in able if self._threads[n].has_begun]
        self._give(begun[-1] if begun else able[0] if able else -1)

    # -- the watch ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Until all are done: take the turn from who waits for a lock."""
        seen: tuple[Any, ...] = ()
        since = time.monotonic()
        while not self._all_done.wait(POLL_S):
            with self._changed:
                now = (self._owner, sum(self._counts), *(_cpu_s(thread) for thread in self._threads))
                if now != seen:
                    seen, since = now, time.monotonic()
                    continue
                idle_s = time.monotonic() - since
                if idle_s > STUCK_AFTER_S:
                    raise Stuck(", ".join(f"thread {n} at {t.last}" for n, t in enumerate(self._threads)))
                if idle_s > BLOCKED_AFTER_S and self._owner >= 0:
                    self._pass_over_if_blocked()

    def _pass_over_if_blocked(self) -> None:
        """The owner waits for something that a paused one holds: another one may go on."""
        owner = self._threads[self._owner]
        if owner.is_waiting or not _is_asleep(owner):  # waiting: it wakes up as soon as it gets a core
            return
        owner.is_blocked = not owner.is_done
        self._give_to_any()


def _cpu_s(thread: _Thread) -> float:
    """The CPU time of a live thread."""
    if not thread.ident or thread.is_done:
        return 0.0
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    except OSError:  # it just ended
        return 0.0


def _is_asleep(thread: _Thread) -> bool:
    """Not running, and not waiting for a core either; True where the system doesn't say (not Linux)."""
    try:
        stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "S"
