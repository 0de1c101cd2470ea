"""The real Scheduler under synthetic load, in virtual time: seconds of traffic in milliseconds."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.core.contract import Limits
from deployments.core.errors import Refusal
from deployments.core.scheduler import Scheduler
from deployments.core.submission import Batch, Example, Result, Submission


@dataclass
class Tally:
    """How the simulated requests ended; latencies in seconds."""

    answered_in_time: int = 0
    answered_late: int = 0
    refused: int = 0
    expired: int = 0
    gave_up: int = 0
    latencies_s: list[float] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)


class Simulation:
    """One server with `limits`, whose batches take `batch_s(cost)` seconds."""

    def __init__(self, limits: Limits, batch_s: Callable[[float], float], seed: int = 0) -> None:
        self.scheduler = Scheduler(limits)
        self.tally = Tally()
        self.now = 0.0
        self._batch_s = batch_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.random = random.Random(seed)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def poisson(self, rate: float, until: float, arrive: Callable[[], None], start: float = 0.0) -> None:
        when = start
        while (when := when + self.random.expovariate(rate)) < until:
            self.at(when, arrive)

    def arrive(self, *, patience_s: float = float("inf"), timeout_s: float = 30.0, cost: float = 1.0) -> None:
        """One request of one item, whose client leaves after `patience_s`."""
        born = self.now

        def done(submission: Submission) -> None:
            result = submission.results[0]
            assert result is not None
            if result.error is not None:
                self.tally.expired += 1
                return
            self.tally.latencies_s.append(self.now - born)
            in_time = self.now - born <= min(patience_s, timeout_s)
            self.tally.answered_in_time += in_time
            self.tally.answered_late += not in_time

        try:
            submission = self.scheduler.submit(
                [Example(None, None, cost)], self.now, timeout_s=timeout_s, priority=0, on_done=done
            )
        except Refusal:
            self.tally.refused += 1
            return
        if patience_s != float("inf"):
            self.at(born + patience_s, lambda: self._give_up(submission))
        self.pump()

    def _give_up(self, submission: Submission) -> None:
        if submission.unresolved:
            self.tally.gave_up += 1
            self.scheduler.cancel(submission, self.now)

    def pump(self) -> None:
        scheduler = self.scheduler
        while len(scheduler.running) < scheduler.limits.slots:
            ready_at = scheduler.ready_at(self.now)
            if ready_at is None:
                return
            if ready_at > self.now:
                self.at(ready_at, self.pump)
                return
            batch = scheduler.form_batch(self.now)
            if batch is None:
                return
            self.tally.fills.append(len(batch.items))
            scheduler.start(batch, self.now)
            self.at(self.now + self._batch_s(batch.cost), lambda batch=batch: self._finish(batch))

    def _finish(self, batch: Batch) -> None:
        self.scheduler.free_slot(batch, self.now)
        self.pump()
        self.scheduler.finish(batch, [Result(output=0) for _ in batch.items], self.now)

    def run(self) -> Tally:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            self.scheduler.expire(self.now)
            action()
        return self.tally
