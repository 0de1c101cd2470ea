"""Reports on disk: found again by what they are about, or by a race's id.

Owns: where they lie, for how long, and that one process at a time makes the report of a model. Must not know:
what is in them beyond keys, weights and races' ids. Those of the shipped models come with the package.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.audit.verdict import UNDECIDED

KEPT = 200
"""Reports; the oldest go first."""
SHIPPED = Path(__file__).with_name("shipped")


def folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root, "brimful", "audits")


def save(report: Mapping[str, Any], place: Path | None = None) -> Path:
    """Keep it, in the place of an earlier one of the same key; its file. One that decided nothing takes no
    other's place: it is kept beside it, for its replays."""
    place = place or folder()
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{report['key']}.json"
    if report.get("verdict") == UNDECIDED and (_read(file) or {}).get("verdict", UNDECIDED) != UNDECIDED:
        file = file.with_suffix(".undecided.json")
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1, default=str))
    temporary.replace(file)
    if place == folder():
        for old in sorted(place.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return file


def find(key: str, weights: str | None = None) -> dict[str, Any] | None:
    """The report of a model with this code_key; None where none holds.

    weights: of the loaded model (runtime/digest.digest_of). A report whose `weights` is null holds for all:
    they are made anew at each load, at random. None here: whatever the weights.
    """
    for place in (folder(), SHIPPED):
        found = _read(place / f"{key}.json")
        if found is not None and (weights is None or found.get("weights") in (None, weights)):
            return found
    return None


def find_race(replay: str, place: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(report, evidence) of the race with this id; None where no kept report has it, nor one in `place`."""
    for report in _reports(place):
        for found in report.get("properties", {}).values():
            for one in found["evidence"]:
                if one.get("replay") == replay:
                    return report, one
    return None


@contextmanager
def making() -> Iterator[None]:
    """Hold this while a report is looked for and made: whoever wants the same one waits for it, and whoever
    wants another, too, since audits that share cores find less in their time."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process
        yield


def _reports(place: Path | None) -> Iterator[dict[str, Any]]:
    files = [file for one in (folder(), SHIPPED, place) if one for file in one.glob("*.json")]
    for file in sorted(files, key=lambda one: -one.stat().st_mtime):
        found = _read(file)
        if found is not None:
            yield found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or no report
        return None
    return found if isinstance(found, dict) and "key" in found else None
