"""Drives an engine by hand, on a clock that only steps move."""

import math
from collections.abc import Callable, Hashable

from deployments.engine.blocks import BlockPool
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Advance, Runner, Sequence, Step
from tests.engine.toy import ToyModel


class Walker:
    """Steps sequences whose payload is how many steps are left; streams have no end of their own."""

    def run(self, step: Step) -> list[Advance]:
        return [self._advance(work.sequence) for work in step.work]

    def _advance(self, sequence: Sequence) -> Advance:
        if sequence.payload is None:
            return Advance(outputs=("out",))
        sequence.payload -= 1
        is_done = sequence.payload == 0
        return Advance(units=0 if is_done else 1, outputs=("out",), is_done=is_done)


def walk(
    steps: int = 10**9,
    *,
    key: Hashable = "",
    cost: float = 1.0,
    arrived: float = 0.0,
    priority: int = 0,
    deadline: float = math.inf,
) -> Sequence:
    """A sequence of a step-wise class without chunks."""
    return Sequence(
        payload=steps,
        known=1,
        key=key,
        cost=cost,
        arrived=arrived,
        priority=priority,
        deadline=deadline,
    )


def stream(*, arrived: float = 0.0) -> Sequence:
    """A sequence of a class with chunks: open, and without work."""
    return Sequence(is_open=True, arrived=arrived)


class Drive:
    """step_s: how long a step takes."""

    def __init__(
        self, limits: EngineLimits, pool: BlockPool | None = None, *, step_s: Callable[[Step], float]
    ) -> None:
        self.engine = Engine(limits, pool)
        self.runner: Runner = Walker() if pool is None else ToyModel(pool)
        self.now = 0.0
        self._step_s = step_s

    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            sequence.arrived = sequence.arrived or self.now
        self.engine.submit(sequences, self.now)

    def step(self) -> Step:
        """Plan, run, commit; there must be work."""
        step = self.engine.plan(self.now)
        assert step is not None, "nobody can step"
        advances = self.runner.run(step)
        self.now += self._step_s(step)
        self.engine.commit(step, advances, self.now)
        return step

    def steps(self, count: int) -> list[Step]:
        return [self.step() for _ in range(count)]

    def until_idle(self, most: int = 10_000) -> list[Step]:
        """Step until nothing is left to do."""
        steps = []
        while (step := self.engine.plan(self.now)) is not None:
            self.engine.commit(step, self.runner.run(step), self.now + self._step_s(step))
            self.now += self._step_s(step)
            steps.append(step)
            assert len(steps) < most, "it never ends"
        return steps


def who(step: Step) -> list[Sequence]:
    return [work.sequence for work in step.work]
