"""What tune found: the choice, how sure it is, the curves, the lines of the config.

Owns: its words and its JSON. Must not know: how anything was measured, YAML.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.tune import show
from scripts.tune.application import Application
from scripts.tune.config_lines import Change, lines
from scripts.tune.points import Curve, Look, Point


@dataclass(slots=True)
class Result:
    """decided: the choice is sure, or it is sure that the config's values are as good. why: one sentence."""

    application: Application
    objective: str
    chosen: Point
    decided: bool = False
    why: str = ""
    gain: dict[str, float] | None = None
    rate: float = 0.0
    now_rate: float = 0.0
    p99_ms: float | None = None
    unit: str = "items"
    device: str = "cpu"
    curves: list[Curve] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    looks: Mapping[Point, list[Look]] = field(default_factory=dict)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        app = self.application
        cpus = f"{app.cpus} cpu{'s' * (app.cpus > 1)}"
        yield f"{app.name}: {self.objective}, {cpus}, {self.device}; measured for {self.seconds:.0f} s"
        for curve in self.curves:
            chosen, now = (_value(point, curve.key) for point in (self.chosen, app.start))
            title = app.batch_key if curve.key == "batch" else "slots x threads of each"
            drawn = list(show.curve_lines(curve, title, (chosen, now), self.unit))
            if drawn:
                yield ""
                yield from drawn
        yield ""
        yield f"  {'chosen' if self.decided else 'not decided'}: {self.why}"
        yield from (f"  note: {note}" for note in self.notes)
        if self.changes:
            yield ""
            yield from (f"  {line}" for line in lines(self.changes))

    def to_json(self) -> dict[str, Any]:
        app = self.application
        return {
            "application": app.name,
            "objective": self.objective,
            "decided": self.decided,
            "why": self.why,
            "unit": self.unit,
            "chosen": _named(app, self.chosen),
            "config": _named(app, app.start),
            "rate": round(self.rate, 3),
            "config_rate": round(self.now_rate, 3),
            "p99_ms": self.p99_ms,
            "gain": self.gain,
            "changes": [asdict(change) for change in self.changes],
            "curves": [
                {
                    "key": c.key,
                    "rates": {_word(v): [round(r, 3) for r in rates] for v, rates in c.rates.items()},
                }
                for c in self.curves
            ],
            "measured": [
                _named(app, point) | {"rates": [round(look.rate, 3) for look in looks]}
                for point, looks in self.looks.items()
            ],
            "notes": self.notes,
            "device": self.device,
            "cpus": app.cpus,
            "seconds": round(self.seconds, 2),
        }


def _value(point: Point, key: str) -> Any:
    return {"batch": point.batch, "cost": point.cost}.get(key, point.shape)


def _word(value: Any) -> str:
    return value.text() if hasattr(value, "text") else str(value)


def _named(app: Application, point: Point) -> dict[str, Any]:
    """A point by the config's keys. threads: of all slots of a process."""
    shape = point.shape
    named: dict[str, Any] = {app.batch_key: point.batch, app.cost_key: point.cost}
    if not app.job.is_continuous:
        named["slots"] = shape.slots
    named["threads"] = shape.slots * shape.threads
    return named | {"optimise": list(shape.variant), "num_replicas": shape.replicas}
