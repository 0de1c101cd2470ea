"""Any order of arrivals, cancellations, time and batches: nothing leaks, nothing ends twice."""

import math

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from deployments.core.contract import Limits
from deployments.core.errors import Refusal, RequestTooLarge
from deployments.core.scheduler import Scheduler
from deployments.core.submission import Batch, Example, Result, Submission

LIMITS = Limits(max_batch_size=4, max_batch_cost=10.0, slots=2, max_queue_items=12, max_queue_cost=60.0)


class SchedulerMachine(RuleBasedStateMachine):
    submissions = Bundle("submissions")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(LIMITS)
        self.now = 0.0
        self.ended: dict[int, int] = {}
        self.alive: list[Submission] = []
        self.batches: list[Batch] = []

    @rule(
        target=submissions,
        costs=st.lists(st.floats(0.5, 12.0), min_size=1, max_size=13),
        keys=st.integers(0, 2),
        priority=st.integers(-10, 10),
        timeout_s=st.floats(0.01, 30.0),
    )
    def submit(self, costs: list[float], keys: int, priority: int, timeout_s: float) -> Submission | None:
        examples = [Example(i, i % (keys + 1), cost) for i, cost in enumerate(costs)]
        waiting = len(self.scheduler.waiting)
        try:
            submission = self.scheduler.submit(
                examples, self.now, timeout_s=timeout_s, priority=priority, on_done=self._on_done
            )
        except (Refusal, RequestTooLarge):
            assert len(self.scheduler.waiting) == waiting  # none begun, none queued
            return None
        self.alive.append(submission)
        return submission

    def _on_done(self, submission: Submission) -> None:
        self.ended[id(submission)] = self.ended.get(id(submission), 0) + 1

    @rule(submission=submissions)
    def cancel(self, submission: Submission | None) -> None:
        if submission is not None and submission.unresolved and not submission.cancelled:
            self.scheduler.cancel(submission, self.now)
            assert not submission.waiting

    @rule(seconds=st.floats(0.001, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.expire(self.now)
        assert all(s.deadline > self.now or not s.waiting for s in self.alive)

    @rule()
    def start_a_batch(self) -> None:
        if len(self.scheduler.running) >= LIMITS.slots:
            return
        oldest = self.scheduler.oldest_age_s(self.now)
        batch = self.scheduler.form_batch(self.now)
        if batch is None:
            assert not len(self.scheduler.waiting)
            return
        assert 1 <= len(batch.items) <= LIMITS.max_batch_size
        assert batch.cost <= 10.0 + 1e-9
        assert len({item.example.key for item in batch.items}) == 1
        assert oldest >= 0.0
        self.scheduler.start(batch, self.now)
        self.batches.append(batch)

    @rule(seconds=st.floats(0.001, 1.0))
    def finish_a_batch(self, seconds: float) -> None:
        if not self.batches:
            return
        self.now += seconds
        batch = self.batches.pop(0)
        self.scheduler.free_slot(batch, self.now)
        self.scheduler.finish(batch, [Result(output=1) for _ in batch.items], self.now)

    @invariant()
    def what_waits_is_accounted_for(self) -> None:
        waiting = [item for s in self.alive for item in s.waiting.values()]
        assert len(waiting) == len(self.scheduler.waiting) <= LIMITS.max_queue_items
        cost = sum(item.example.cost for item in waiting)
        assert math.isclose(cost, self.scheduler.waiting.cost, abs_tol=1e-6)
        assert cost <= 60.0 + 1e-6

    @invariant()
    def every_submission_ends_at_most_once(self) -> None:
        assert all(count == 1 for count in self.ended.values())

    def teardown(self) -> None:
        while self.batches or len(self.scheduler.waiting):
            self.start_a_batch()
            self.finish_a_batch(0.1)
        for submission in self.alive:
            assert submission.cancelled or (submission.unresolved == 0 and self.ended[id(submission)] == 1)
        assert not self.scheduler.running
        assert self.scheduler.next_deadline() is None


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
