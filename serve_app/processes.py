"""Which processes belong to a server, and how they end. Reads /proc (proc(5)); stdlib only.

A server is one Unix session: the launcher starts it with `setsid`, and neither Ray's processes nor
HAProxy ever leave it (Ray makes process groups, not sessions). A session number is not given to
anyone else while a member lives (not even a zombie); once all are gone it may be a stranger's. So a
session is ours where its leader is still the recorded one, or where a member's environment has the
server's random mark: then the session has lived on since, and all its members are ours, those without
an environment of their own included. Must not know: Ray, HTTP.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "BRIMFUL_SERVER"
"""Variable in the environment of all of a server's processes: a random name for it."""
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    session: int
    start_ticks: int  # since boot: with the pid it names a process for good
    state: str
    name: str


def read(pid: int) -> Process | None:
    """The process as /proc tells it, or None where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # "pid (name) state ppid pgrp session ... starttime(22)"; the name may hold spaces and ")"
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0], name)


def is_same(pid: int, start_ticks: int) -> bool:
    """Whether the process recorded as (pid, start_ticks) still lives."""
    process = read(pid)
    return process is not None and process.start_ticks == start_ticks and process.state != "Z"


def session_members(session: int) -> list[Process]:
    """Live processes of one session; zombies don't count, they hold nothing."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            process = read(int(entry))
            if process is not None and process.session == session and process.state != "Z":
                members.append(process)
    return members


def boot_id() -> str:
    """Of this boot: pids and start ticks mean nothing in another (random(4))."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def has_mark(pid: int, mark: str) -> bool:
    """Whether the process was started with `MARK=mark` in its environment."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environ.split(b"\0")


def is_ours(session: int, start_ticks: int, mark: str) -> bool:
    """False where the session is empty, or its number has gone to someone else since."""
    leader = read(session)
    if leader is not None:
        return leader.start_ticks == start_ticks
    return any(has_mark(process.pid, mark) for process in session_members(session))


def end_session(
    session: int, start_ticks: int, mark: str, *, term_s: float, kill_s: float = 2.0
) -> list[str]:
    """End all processes of a recorded session: SIGTERM, then SIGKILL after `term_s`.

    Returns the names of those still alive after `kill_s` more: empty is success.
    """
    if not is_ours(session, start_ticks, mark):
        return []
    for number, wait_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        if wait_s <= 0:
            continue
        deadline = time.monotonic() + wait_s
        signalled: set[int] = set()
        while members := session_members(session):
            for process in members:
                # SIGKILL goes to every member again and again: raylet may just have made a new one
                if process.pid not in signalled or number == signal.SIGKILL:
                    signalled.add(process.pid)
                    send(process.pid, number)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        else:
            return []
    return [process.name for process in session_members(session)]


def send(pid: int, number: int) -> None:
    """Send a signal; a process already gone is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
