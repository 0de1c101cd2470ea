"""Items and the submissions they came in: the batcher's values.

Owns: who waits, since when, for whom, and how an item ends exactly once. Must not know: asyncio,
threads, what an example is.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.core.errors import ServingError


@dataclass(frozen=True, slots=True)
class Example:
    """One preprocessed item. Only examples of equal `key` share a batch; `cost` > 0 in the model's unit."""

    value: Any
    key: Hashable = None
    cost: float = 1.0


@dataclass(slots=True)
class Result:
    """What became of one item: `error`, or `output` as the model returned it."""

    output: Any = None
    error: ServingError | None = None


@dataclass(slots=True, eq=False)
class Item:
    """One example in the queue or in a batch. `tag` is its virtual start time (see Scheduler)."""

    submission: "Submission"
    index: int
    example: Example
    tag: float
    serial: int


@dataclass(slots=True, eq=False)
class Submission:
    """The items of one request; `on_done` is called once, when the last of them has a result.

    Times are seconds of the scheduler's clock. `began` is when its latest item entered a batch,
    `batch_items` and `model_s` describe that batch.
    """

    examples: Sequence[Example]
    arrived: float
    deadline: float
    priority: int
    on_done: Callable[["Submission"], None]
    results: list[Result | None] = field(default_factory=list)
    waiting: dict[int, Item] = field(default_factory=dict)
    unresolved: int = 0
    began: float | None = None
    batch_items: int = 0
    model_s: float = 0.0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.results = [None] * len(self.examples)
        self.unresolved = len(self.examples)

    def resolve(self, index: int, result: Result) -> None:
        """Give item `index` its result; later results for the same item are ignored."""
        if self.results[index] is not None:
            return
        self.results[index] = result
        self.unresolved -= 1
        if self.unresolved == 0:
            self.examples = ()  # may be images; the deadline queue can remember us for a while
            if not self.cancelled:
                self.on_done(self)


@dataclass(slots=True, eq=False)
class Batch:
    """Items that run together; `started` and `expected_end` are in clock seconds."""

    items: list[Item]
    cost: float
    started: float = 0.0
    expected_end: float = 0.0
