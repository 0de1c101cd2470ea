"""What the engine schedules: sequences, the work of a step, and what came of it.

Owns: these values and who may write which field. Must not know: tokens' meaning, tensors, clocks.

A unit is what one run of the model adds to a sequence: a token whose keys and values are stored (a
language model), a chunk that was consumed (a stream), a step (any other model). A sequence has
`known` units of work in hand, of which `computed` are done; the rest is what it could do next.
"""

import math
from collections.abc import Hashable
from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from deployments.core.errors import ServingError


class State(Enum):
    NEW = "new"
    WAITING = "waiting"  # for a slot; after a preemption again
    RUNNING = "running"  # has a slot, and blocks for what is known
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence. The upper fields are the submitter's, the lower ones the engine's alone.

    payload: the runner's and the bridge's, never looked at here. key: only sequences of one key share
    a step. cost: in slots. arrived, deadline: seconds of the engine's clock; it must have begun by
    its deadline. tokens: of a language model: the prompt, then what was generated; they name the blocks
    that the prefix cache may share. max_units: `known` never passes it (the KV bound); 0: no KV.
    is_open: input may still come, so being without work is no end.
    """

    payload: Any = None
    key: Hashable = ""
    cost: float = 1.0
    priority: int = 0
    arrived: float = 0.0
    deadline: float = math.inf
    tokens: list[int] = field(default_factory=list)
    max_units: int = 0
    known: int = 0
    is_open: bool = False

    state: State = State.NEW
    computed: int = 0
    slot: int = -1
    prompt: int = 0  # units known when it was submitted
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # units of the prompt that came from the prefix cache when it first began
    began: float | None = None
    serial: int = 0
    siblings: Values["Sequence"] = ()  # submitted together, itself among them
    is_held: bool = False
    preemptions: int = 0
    error: ServingError | None = None

    @property
    def remaining(self) -> int:
        return self.known - self.computed


@dataclass(slots=True)
class Work:
    """One sequence's share of a step: units [start, start + count).

    is_last: afterwards nothing known remains, so a language model samples the next token from it.
    blocks: those of the sequence when the step was planned. It may be cancelled while the step runs;
    what it held then is given to nobody before the next plan.
    """

    sequence: Sequence
    start: int
    count: int
    is_last: bool
    blocks: Values[int] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Between a slot's row and the cache: `block` of the cache holds units [start, start + count) of it.

    Where blocks are shared in place there is nothing to copy.
    """

    slot: int
    block: int
    start: int
    count: int


@dataclass(slots=True)
class Step:
    """What to run next, in this order: `saves` (row to cache, of units computed by earlier steps, also
    of rows that are about to be freed), `freed` slots and `ended` sequences let go, `loads` (cache to
    row), then `work`.

    freed: slots that lost their sequence since the last step, ended or preempted; they may be in use
    again by `work`. ended: sequences that left since the last step, whatever the reason, and had begun.
    """

    work: list[Work]
    saves: list[Copy]
    freed: list[int]
    ended: list[Sequence]
    loads: list[Copy]
    key: Hashable
    planned: float

    @property
    def units(self) -> int:
        return sum(work.count for work in self.work)


@dataclass(slots=True)
class Advance:
    """What a run made of one `Work`.

    units: known from now on besides what was known before: 1 after a token or a step that has a
    successor, 0 for a chunk or a part of a prompt. token: the unit's token. outputs: for the
    consumer, in order. With is_done or error the sequence ends.
    """

    units: int = 0
    token: int | None = None
    outputs: Values[Any] = ()
    is_done: bool = False
    error: ServingError | None = None


class Runner(Protocol):
    """Runs steps; called on the model thread alone, one step after the other."""

    def run(self, step: Step) -> list[Advance]:
        """One Advance for each of `step.work`, in order; `work` may be empty.

        What fails for one sequence is its Advance's error. What is raised fails all of the step.
        """
        ...
