"""Who goes on at a pause point: interleavings as values, so that one that fails can be shown again.

Owns: the kinds of schedules, their JSON. Must not know: threads, torch, what a point is. A schedule is asked
at each pause and answers from the counts alone, so that the same schedule gives the same interleaving.
Source: Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs" (ASPLOS
2010); DESIGN, "The audit".
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Schedule(Protocol):
    def next(self, thread: int, counts: Sequence[int]) -> int:
        """The thread that goes on after the pause number counts[thread] of `thread`, counted from 1."""


@dataclass(frozen=True, slots=True)
class Lockstep:
    """`stride` points each, in turn."""

    stride: int

    def next(self, thread: int, counts: Sequence[int]) -> int:
        return thread if counts[thread] % self.stride else (thread + 1) % len(counts)


@dataclass(frozen=True, slots=True)
class Inside:
    """Thread k stops at its point pauses[k] and lets k + 1 begin; the last runs whole. Then they go on, the
    last that stopped first: each call lies inside a pause of the one before."""

    pauses: tuple[int, ...]

    def next(self, thread: int, counts: Sequence[int]) -> int:
        is_last = thread == len(counts) - 1
        return thread if is_last or counts[thread] != self.pauses[thread] else thread + 1


@dataclass(frozen=True, slots=True)
class Meet:
    """Each thread goes alone to its point meets[thread]; from there they go one point each, in turn. Lockstep
    of calls that take unlike ways to the place where they race: a batch of four is stacked in more steps than
    a batch of one."""

    meets: tuple[int, ...]

    def next(self, thread: int, counts: Sequence[int]) -> int:
        if counts[thread] < self.meets[thread]:
            return thread
        return (thread + 1) % len(counts)


@dataclass(frozen=True, slots=True)
class Overlap:
    """At each point another thread goes on with probability `share`, drawn from the seed and the point."""

    seed: int
    share: float

    def next(self, thread: int, counts: Sequence[int]) -> int:
        # Splitmix64 of (seed, thread, count): no state, so a thread that was blocked disturbs no draw.
        draw = _mix(_mix(_mix(self.seed) ^ thread) ^ counts[thread])
        if draw >= self.share * 2**64:
            return thread
        return (thread + 1 + draw % max(1, len(counts) - 1)) % len(counts)


KINDS: Mapping[str, type[Lockstep] | type[Inside] | type[Meet] | type[Overlap]] = {
    "lockstep": Lockstep,
    "inside": Inside,
    "meet": Meet,
    "overlap": Overlap,
}


def to_json(schedule: Schedule) -> dict[str, Any]:
    """{"kind": ..., its fields}."""
    kind = next(name for name, made in KINDS.items() if isinstance(schedule, made))
    return {"kind": kind, **asdict(schedule)}  # type: ignore[call-overload]


def from_json(value: Mapping[str, Any]) -> Schedule:
    """The schedule that `to_json` gave. ValueError where it is none."""
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items() if name != "kind"}
    try:
        made: Schedule = KINDS[value["kind"]](**fields)  # type: ignore[arg-type]
        return made
    except (KeyError, TypeError) as error:
        raise ValueError(f"no schedule: {value!r:.200}") from error


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31
