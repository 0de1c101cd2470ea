"""The first runs of a dynamic replica: examples alone and in a full batch, timed and weighed.

Owns: what is run before the first request, and what is learned from it: whether pre- and postprocessing may
run on the event loop, and how dear a batch the memory budget allows. Must not know: HTTP, Ray, slots.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from deployments.core.batcher import Batcher
from deployments.core.contract import Limits, Outcome
from deployments.core.errors import ServingError
from deployments.core.estimate import BatchTimeModel
from deployments.core.submission import Example, Submission
from deployments.runtime.memory import Budget

logger = logging.getLogger(__name__)

TIMEOUT_S = 600.0
LEAST_BYTES = 2**20
"""A full batch that takes no more than this beyond a single item says nothing of an item's memory."""

Prepare = Callable[[Any], tuple[Example | None, ServingError | None]]
Finish = Callable[[Submission], Sequence[Outcome]]


class WarmUp:
    """before_s, after_s: an item's pre- and postprocessing, the fastest that was seen. examples: prepared."""

    def __init__(
        self, batcher: Batcher, limits: Limits, budget: Budget, prepare: Prepare, finish: Finish
    ) -> None:
        self._batcher, self._limits, self._budget = batcher, limits, budget
        self._prepare, self._finish = prepare, finish
        self.before_s = self.after_s = float("inf")
        self.examples: list[Example] = []
        self._weighed: list[tuple[float, int]] = []

    async def run(self, items: Sequence[Any]) -> None:
        """Raises what the model, or its preprocess, raises."""
        admission = self._batcher.scheduler.admission
        full = min(self._limits.max_batch_size, self._limits.max_queue_items)
        if not items:
            logger.info("event=no_warm_up reason=%s", "the model has no examples()")
            return
        for is_measured in (False, True):
            admission.times = BatchTimeModel()  # first runs (allocations, packing) teach nothing
            self.before_s = self.after_s = float("inf")
            for size in (1, full):
                self._budget.reset_peak()
                cost = await self._run_batch([items[i % len(items)] for i in range(size)])
                if is_measured:
                    self._weighed.append((cost, self._budget.peak()))

    def dearest(self, budget_bytes: int) -> float:
        """The cost of a batch that would just fit, with the other slots busy alike; infinite where the
        first runs say nothing of it."""
        if not self._weighed:
            return float("inf")
        one, many = self._weighed
        if many[1] - one[1] < LEAST_BYTES or many[0] <= one[0]:
            return float("inf")
        bytes_per_cost = (many[1] - one[1]) / (many[0] - one[0])
        room = (budget_bytes - one[1]) / max(1, self._limits.slots)
        logger.info("event=measured_memory bytes_per_cost=%.0f room_bytes=%.0f", bytes_per_cost, room)
        return max(one[0], one[0] + room / bytes_per_cost)

    async def _run_batch(self, items: Sequence[Any]) -> float:
        """Its cost."""
        started = time.perf_counter()
        prepared = [self._prepare(item) for item in items]
        self.before_s = min(self.before_s, (time.perf_counter() - started) / len(items))
        self.examples = self._fitting([example for example, _ in prepared if example is not None])
        submission = await self._batcher.submit(self.examples, timeout_s=TIMEOUT_S)
        started = time.perf_counter()
        outcomes = self._finish(submission)
        self.after_s = min(self.after_s, (time.perf_counter() - started) / len(outcomes))
        for error in (*(error for _, error in prepared), *(outcome.error for outcome in outcomes)):
            if error is not None:
                raise error
        return sum(example.cost for example in self.examples)

    def _fitting(self, examples: Sequence[Example]) -> list[Example]:
        """As many as one batch, and the queue, may hold."""
        limit = self._batcher.scheduler.admission.max_batch_cost
        if self._limits.max_queue_cost is not None:
            limit = min(limit, self._limits.max_queue_cost)
        fitting: list[Example] = []
        cost = 0.0
        for example in examples:
            cost += example.cost
            if fitting and cost > limit:
                break
            fitting.append(example)
        return fitting
