"""CPU and memory of a whole tree of processes, from /proc (proc(5)). Linux only; stdlib only.

A tree is every descendant of a process and every member of a session that one of them leads: Ray's
raylet, its workers and HAProxy change parents but never leave the launcher's sessions.
"""

import os
import signal
import socket
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(pid: int, thread: int | None = None) -> tuple[str, list[str]] | None:
    """(name, fields from `state` on) of /proc/PID/stat, or a thread's; None where it is gone."""
    task = "" if thread is None else f"/task/{thread}"
    try:
        text = Path(f"/proc/{pid}{task}/stat").read_text()
    except OSError:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    return name, text[text.rindex(")") + 2 :].split()


class Tree:
    """All processes of a server, found again at each question."""

    def __init__(self, root: int) -> None:
        self.root = root
        self._sessions = {root}

    def members(self) -> dict[int, tuple[str, list[str]]]:
        """pid -> (name, stat fields) of the live members."""
        all_stats = {
            int(entry): stat
            for entry in os.listdir("/proc")
            if entry.isdigit() and (stat := _stat(int(entry))) is not None and stat[1][0] != "Z"
        }
        found = {self.root} & all_stats.keys()
        while True:
            # Sessions are remembered: a member that outlives its parents is still a member.
            self._sessions |= {pid for pid in found if all_stats[pid][1][3] == str(pid)}
            more = {
                pid
                for pid, (_, fields) in all_stats.items()
                if int(fields[1]) in found or int(fields[3]) in self._sessions
            }
            if more <= found:
                return {pid: all_stats[pid] for pid in found}
            found |= more

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds since start, by process name, with those of children already reaped."""
        seconds: dict[str, float] = {}
        for name, fields in self.members().values():
            # utime, stime, cutime, cstime: fields 14 to 17 of proc(5), `state` being the third
            ticks = sum(int(value) for value in fields[11:15])
            seconds[name] = seconds.get(name, 0.0) + ticks / TICKS
        return seconds

    def rss_bytes(self, name: str = "") -> int:
        """Resident memory of the members whose name holds `name` (shared pages count each time)."""
        return sum(int(fields[21]) * PAGE_BYTES for found, fields in self.members().values() if name in found)

    def anonymous_bytes(self, name: str) -> int:
        """Memory that is the members' own, of those whose name holds `name`: no file's, no shared page."""
        found = 0
        for pid, (member, _) in self.members().items():
            if name in member:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
        return found

    def kill(self) -> None:
        """SIGKILL every member until none is left."""
        deadline = time.monotonic() + 5.0
        while (members := self.members()) and time.monotonic() < deadline:
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)


class CpuMeter:
    """CPU seconds of a tree between `start` and `stop`."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._before: dict[str, float] = {}
        self._began = 0.0

    def start(self) -> None:
        self._before, self._began = self._tree.cpu_s(), time.monotonic()

    def stop(self) -> tuple[float, dict[str, float], float]:
        """(total CPU seconds, by process name, wall seconds) since `start`."""
        after, wall_s = self._tree.cpu_s(), time.monotonic() - self._began
        names = {name: after[name] - self._before.get(name, 0.0) for name in after}
        return sum(names.values()), {n: round(s, 3) for n, s in names.items() if s > 0.004}, wall_s


class Threads:
    """CPU seconds of a tree's threads since this was made; a thread that ended meanwhile is lost."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._before = self._read()

    def cpu_s(self) -> dict[tuple[str, int], float]:
        """(process name, thread id) -> seconds."""
        return {thread: s - self._before.get(thread, 0.0) for thread, s in self._read().items()}

    def _read(self) -> dict[tuple[str, int], float]:
        found = {}
        for pid, (name, _) in self._tree.members().items():
            try:
                numbers = os.listdir(f"/proc/{pid}/task")
            except OSError:
                continue
            for number in numbers:
                if (stat := _stat(pid, int(number))) is not None:
                    found[name, int(number)] = sum(map(int, stat[1][11:13])) / TICKS
        return found
