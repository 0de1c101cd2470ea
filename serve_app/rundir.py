"""A server's folder: its record, its sockets, its logs; and what is left of a server that was killed.

One folder per user and HTTP port, mode 700, under the temporary directory: HAProxy's admin socket
is in there. Kept short: a Unix socket path has 107 bytes, and Ray adds 70 of its own.
Must not know: Ray, config.
"""

import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from serve_app import processes

_RECORD, _LOCK = "server.json", "lock"
_LONGEST_BASE = 30  # "/tmp" gives 20 with the folder name; longer than this and Ray's sockets don't fit


class RunDirError(Exception):
    """The folder can't be used; the message says why and what to do."""


class PortServedError(RunDirError):
    """A live launcher serves on this port."""


@dataclass(frozen=True, slots=True)
class Record:
    """Who runs here; a later start ends exactly these and nothing else."""

    launcher: int
    server: int  # the session's leader
    server_ticks: int
    mark: str  # see processes.py
    boot_id: str


class RunDir:
    """The folder of the server on one port, locked for as long as this object is open."""

    def __init__(self, port: int) -> None:
        """Raises PortServedError where a live launcher holds the port's folder."""
        base = _base()
        self.path = base / str(port)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock = _locked(self.path / _LOCK, port)

    @property
    def haproxy(self) -> Path:
        return self.path / "h"  # short: Ray appends a node id of 56 characters

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def logs(self) -> Path:
        return self.ray / "session_latest" / "logs"

    def end_leftovers(self) -> list[str]:
        """End what a killed server left running, if it is recorded here as ours; returns names.

        Then empty the folder: the sockets and logs in it are the old server's.
        """
        ended: list[str] = []
        record = self._read_record()
        if record is not None and _is_alive(record):
            ended = sorted({p.name for p in processes.session_members(record.server)})
            left = processes.end_session(record.server, record.server_ticks, record.mark, term_s=0)
            if left:
                raise RunDirError(f"an earlier server's processes don't end: {', '.join(left)}")
        for child in self.path.iterdir():
            if child.name != _LOCK:
                _remove(child)
        return ended

    def write_record(self, server: int, mark: str) -> Record:
        leader = processes.read(server)
        ticks = leader.start_ticks if leader else 0
        record = Record(os.getpid(), server, ticks, mark, processes.boot_id())
        partial = self.path / (_RECORD + ".new")
        partial.write_text(json.dumps(asdict(record)))
        partial.rename(self.path / _RECORD)
        return record

    def _read_record(self) -> Record | None:
        try:
            return Record(**json.loads((self.path / _RECORD).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def close(self) -> None:
        """Remove record and sockets; Ray's logs stay until the next start on this port."""
        (self.path / _RECORD).unlink(missing_ok=True)
        _remove(self.haproxy)
        for sockets in self.ray.glob("session_*/sockets"):
            _remove(sockets)
        self._lock.close()


def _is_alive(record: Record) -> bool:
    same_boot = record.boot_id == processes.boot_id()
    return same_boot and processes.is_ours(record.server, record.server_ticks, record.mark)


def _base() -> Path:
    name = f"brimful-{os.getuid()}"
    base = Path(tempfile.gettempdir()) / name
    if len(str(base)) > _LONGEST_BASE and Path("/tmp").is_dir():
        base = Path("/tmp") / name
    base.mkdir(mode=0o700, exist_ok=True)
    # Anyone may have made it first in a shared temporary directory, a link included.
    info = base.lstat()
    if info.st_uid != os.getuid() or base.is_symlink() or info.st_mode & 0o077:
        raise RunDirError(f"{base} belongs to someone else or is open to others: remove it first")
    return base


def _locked(path: Path, port: int) -> TextIO:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise PortServedError(f"port {port} is served by another brimful (pid {holder})") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
