"""What tune chooses between: one setting of an application's keys, and what a look at it found.

Owns: these values and their words. Must not know: torch, how a setting is measured or searched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.core.contract import Limits


@dataclass(frozen=True, slots=True)
class Shape:
    """What a process is started with. threads: torch's, of one slot. replicas: processes at once."""

    slots: int = 1
    threads: int = 1
    variant: tuple[str, ...] = ()
    replicas: int = 1

    def text(self) -> str:
        words = f"{self.slots} slot{'s' * (self.slots > 1)} x {self.threads} thread{'s' * (self.threads > 1)}"
        words += f", {'+'.join(self.variant)}" if self.variant else ""
        return words + (f", {self.replicas} replicas" if self.replicas > 1 else "")


@dataclass(frozen=True, slots=True)
class Point:
    """A shape and the limits that can be changed in place.

    batch: max_batch_size, of a continuous application max_sequences. cost: max_batch_cost or
    max_tokens_in_step; None: the model's own.
    """

    shape: Shape
    batch: int
    cost: float | None = None

    def with_batch(self, batch: int) -> "Point":
        return replace(self, batch=batch)

    def with_cost(self, cost: float | None) -> "Point":
        return replace(self, cost=cost)

    def with_shape(self, shape: Shape) -> "Point":
        return replace(self, shape=shape)


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to know of the application. folders: where its modules are looked for.

    gpus: as the deployment asks for them; a CPU without. inputs: a file of items, one a line, or None.
    report: the stored audit of the model, or None.
    """

    name: str
    model: str
    model_args: dict[str, Any]
    limits: Limits
    is_continuous: bool = False
    safety: str = "auto"
    gpus: float = 0.0
    folders: tuple[str, ...] = ()
    inputs: str | None = None
    report: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A process is ready. costs: of the items, in the model's unit. rss_bytes: its resident memory."""

    device: str
    cost_unit: str
    costs: tuple[float, ...]
    rss_bytes: int
    max_batch_cost: float | None
    is_language: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """One measurement. rate: items (tokens, steps) a second. size: of a batch or step, mean.

    p99_ms: of answers, or of the gaps between a sequence's outputs. late_share: of answers over what was
    allowed. ran_out: memory did. busy: CPUs in use, of all; a thread that spins at a barrier counts.
    """

    rate: float
    size: float = 0.0
    p99_ms: float = 0.0
    late_share: float = 0.0
    ran_out: bool = False
    busy: float = 0.0


@dataclass(slots=True)
class Curve:
    """Rates along one key, for the plot: value -> all looks' rates."""

    key: str
    rates: dict[Any, list[float]] = field(default_factory=dict)

    def add(self, value: Any, rate: float) -> None:
        self.rates.setdefault(value, []).append(rate)


class CouldNotRun(Exception):
    """The application can't be measured; the text says what to change."""


class OutOfBudget(Exception):
    """The time is over before the next measurement would end."""
