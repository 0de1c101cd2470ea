"""Reports on disk, by what they are about: found again by a replay's id.

Owns: where they lie and for how long. Must not know: what is in them beyond its races' ids.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = 200
"""Reports; the oldest go first."""


def folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root, "brimful", "audits")


def save(report: dict[str, Any]) -> Path:
    """Keep it, in the place of an earlier one of the same target; its file."""
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    named = json.dumps([report["target"], report["model"]], sort_keys=True)
    file = place / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(file)
    for old in sorted(place.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return file


def find_race(replay: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(report, evidence) of the race with this id; None where no kept report has it."""
    for report in _reports():
        for found in report["properties"].values():
            for one in found["evidence"]:
                if one.get("replay") == replay:
                    return report, one
    return None


def _reports() -> Iterator[dict[str, Any]]:
    for file in sorted(folder().glob("*.json"), key=lambda one: -one.stat().st_mtime):
        try:
            yield json.loads(file.read_text())
        except ValueError:  # cut off while it was written by a version without rename
            continue
