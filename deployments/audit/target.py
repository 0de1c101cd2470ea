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


Batch = tuple[Input, ...]
"""The items of one call."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the first phase found, for the others, so that all number the calls alike.

    calls: those that go through. is_random: the first follows the seeds. repeats: made again in another
    order they give the same: nothing is kept that matters. is_slow: a call takes instances.SLOW_S and more:
    there is time for the most telling trials alone.
    """

    calls: tuple[Batch, ...]
    is_random: bool = False
    repeats: bool = True
    is_slow: bool = False

    @property
    def least_trials(self) -> int:
        """Overlaps without a difference before "no difference" is said."""
        return LEAST_OF_SLOW if self.is_slow else LEAST_TRIALS

    def as_json(self) -> dict[str, Any]:
        calls = [[[item.example, item.change] for item in batch] for batch in self.calls]
        return {
            "calls": calls, "is_random": self.is_random, "repeats": self.repeats, "is_slow": self.is_slow,
        }  # fmt: skip

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Known":
        calls = tuple(tuple(Input(*item) for item in batch) for batch in value["calls"])
        return Known(calls, value["is_random"], value["repeats"], value.get("is_slow", False))


LEAST_TRIALS = 30
"""One call inside another at 16 places, lockstep of 5 strides, nine calls in flight at 8 places."""
LEAST_OF_SLOW = 10
"""The same at a quarter of the places, and three meetings."""
