"""One interleaved run and what it found, as values that go through JSON and are told in a report.

Owns: these values. Must not know: how calls are run, which trials are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.audit import schedules
from deployments.audit.instruments import Instruments
from deployments.audit.schedules import Schedule
from deployments.audit.turns import Point

MAX_LINES = 8
"""Of a stretch."""
MAX_STEPS = 200
"""Of an interleaving, told in a report."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One interleaved run: which of the calls (by index), paused where, in which order."""

    calls: tuple[int, ...]
    instruments: Instruments
    schedule: Schedule

    def as_json(self) -> dict[str, Any]:
        return {
            "calls": list(self.calls),
            "instruments": str(self.instruments.name),
            "schedule": schedules.to_json(self.schedule),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Trial":
        schedule = schedules.from_json(value["schedule"])
        return Trial(tuple(value["calls"]), Instruments[value["instruments"]], schedule)


@dataclass(frozen=True, slots=True)
class Finding:
    """A trial that gave something else than the calls alone.

    thread: the first whose answer differs. how: a sentence's end. points: the interleaving, for showing it.
    values: where the answers differ first, alone and here; empty where that is not what differs.
    """

    trial: Trial
    thread: int
    how: str
    points: list[Point]
    values: tuple[str, str] = ("", "")

    def as_json(self) -> dict[str, Any]:
        return {
            "trial": self.trial.as_json(),
            "thread": self.thread,
            "how": self.how,
            "steps": stretches(self.points)[:MAX_STEPS],
            "values": list(self.values),
        }


def stretches(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The interleaving with stretches of one thread folded: where each begins and ends, its points, and the
    last of them that are lines of the model's own code."""
    found: list[dict[str, Any]] = []
    for point in points:
        if found and found[-1]["thread"] == point.thread:
            found[-1]["to"] = point.what
            found[-1]["points"] += 1
        else:
            found.append(
                {"thread": point.thread, "from": point.what, "to": point.what, "points": 1, "lines": []}
            )
        if "/" in point.what:
            found[-1]["lines"] = [*found[-1]["lines"][1 - MAX_LINES :], point.what]
    return found
