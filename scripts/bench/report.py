"""What a benchmark leaves behind: one JSON object with figures, targets and where they come from.

Owns: its shape, the target rule, hardware and versions. No host names, no paths.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOAD_AT_START = os.getloadavg()[0]
"""Runnable processes in the last minute, before we began: well above 0, and others took the cores."""
PACKAGES = ("ray", "torch", "transformers", "tokenizers", "msgspec", "starlette", "uvloop", "pillow")


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one figure: `figure` is its dotted path in `figures`."""

    figure: str
    bound: float
    is_least: bool = True

    def text(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.bound:g}"

    def is_reached(self, figures: dict[str, Any]) -> bool:
        value: Any = figures
        for part in self.figure.split("."):
            value = value[part]
        return bool(value >= self.bound if self.is_least else value <= self.bound)


def least(figure: str, bound: float) -> Target:
    return Target(figure, bound)


def most(figure: str, bound: float) -> Target:
    return Target(figure, bound, is_least=False)


@dataclass(slots=True)
class Report:
    """One benchmark's result. config: what was served and offered, so that it can be repeated."""

    benchmark: str
    figures: dict[str, Any]
    targets: list[Target]
    config: dict[str, Any]
    is_short: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    load_before: float = field(default_factory=lambda: round(LOAD_AT_START, 2))

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "figures": self.figures,
            "target": {target.figure: target.text() for target in self.targets},
            "reached": {target.figure: target.is_reached(self.figures) for target in self.targets},
            "short": self.is_short,
            "git_sha": git_sha(),
            "config": self.config,
            "hardware": hardware(),
            "load_average_at_start": self.load_before,
            "versions": self.versions or versions(),
        }

    def publish(self, out: Path | None) -> None:
        """Write the JSON to `out` and print it as one line: the last of stdout."""
        value = self.to_json()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(value, indent=1) + "\n")
        print(json.dumps(value), flush=True)


def git_sha() -> str:
    """The commit measured; with "+" where what is served differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    sha = git("rev-parse", "--short=12", "HEAD")
    is_changed = git("status", "--porcelain", "--", "deployments", "serve_app", "serve.env")
    return f"{sha}{'+' if is_changed else ''}" or "unknown"


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def say(text: str) -> None:
    """Progress, for whoever watches."""
    print(text, flush=True)
