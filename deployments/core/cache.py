"""Where converted models are kept: made once for all processes, checked at every start, rebuilt when damaged.

Owns: the folder's place, its checksums, and that no process ever sees half of one. Must not know: what is
converted, or how. A file that nobody wrote to since it was made is not read to be checked.
Source: XDG Base Directory Specification, "$XDG_CACHE_HOME".
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_logger = logging.getLogger(__name__)


def find_or_make(name: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` of the cache, filled by `make(folder)` where it is missing or damaged.

    A second process that wants the same waits for the first. Raises what `make` raises, and OSError
    where no place can be written to.
    """
    for root in _roots():
        if _is_whole(root / name):
            return root / name
    root = cache_folder()
    folder = root / name
    with _locked(root / f".{name}.lock"):
        if _is_whole(folder):  # another process made it while this one waited
            return folder
        if folder.exists():
            _logger.warning("event=cache_damaged folder=%s action=rebuild", folder)
        _rebuild(folder, make)
    return folder


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes: finds damage, not malice. 540 MB take 0.2 s (SHA-256: 1.5 s)."""
    value = 0
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _roots() -> list[Path]:
    """Places in the order of preference: the user's cache, else (a read-only home) a temporary folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return [Path(home) / "brimful", Path(tempfile.gettempdir()) / f"brimful-{os.getuid()}"]


def cache_folder() -> Path:
    """The first place that can be written to. Raises PermissionError that names them all."""
    for root in _roots():
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(root, os.W_OK) and root.stat().st_uid == os.getuid():
            return root
        _logger.warning("event=cache_not_writable folder=%s", root)
    raise PermissionError(
        f"no cache folder can be written: {', '.join(map(str, _roots()))}. Set XDG_CACHE_HOME"
    )


def _rebuild(folder: Path, make: Callable[[Path], None]) -> None:
    """Under the lock. The folder appears whole, by its rename; readers of a damaged one keep their files."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        make(part)
        files = {file.name: _facts_of(file) for file in part.iterdir()}
        (part / _MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _facts_of(file: Path) -> list[int]:
    """[size, when it was written, checksum], of a file that is on the disk then, whatever happens."""
    with file.open("rb") as data:
        os.fsync(data.fileno())
    return [*_stamp_of(file), checksum(file)]


def _stamp_of(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


def _is_whole(folder: Path) -> bool:
    """Every file is there as it was made: with its size, and its time or else its checksum."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(_is_as_made(folder / name, *facts) for name, facts in files.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _is_as_made(file: Path, size: int, written: int, crc: int) -> bool:
    found = _stamp_of(file)
    return found == (size, written) or (found[0] == size and checksum(file) == crc)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when its holder dies."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
