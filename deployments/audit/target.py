"""What is audited and with which inputs, as values that cross to a fresh process.

Owns: these values. Must not know: torch; the audit's own process does without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """model: "module:Name", or "path/to/file.py:Name"; folder: where modules and relative paths lie.

    optimise: variants that are applied after load, names of core/variants.py.
    """

    model: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    folder: str = "."
    device: str = "cpu"
    optimise: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Input:
    """One item: an example by its number, as it is ("") or changed: "x100" and "x-100" (its floats times
    that: an outlier), "other" and "other1" to "other8" (other values of the same shapes).
    """

    example: int
    change: str = ""

    def __str__(self) -> str:
        return f"examples()[{self.example}]" + (f" {self.change}" if self.change else "")


LEAST_TRIALS = 30
"""Overlaps without a difference before "no difference" is said: lockstep of all pairs by all instruments."""

Batch = tuple[Input, ...]
"""The items of one call."""
