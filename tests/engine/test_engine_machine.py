"""Any order of arrivals, cancels, failures and steps: nothing leaks, nobody starves, texts are right."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.core.errors import ModelFailed, ServingError
from deployments.engine.blocks import BlockPool
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Advance, Sequence, State, Step
from tests.engine.toy import ToyModel, alone, chat

UNITS, BLOCKS, SLOTS = 4, 12, 3
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class EngineMachine(RuleBasedStateMachine):
    """The toy model in a pool so small that preemption and eviction are usual."""

    shares = True

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, UNITS, shares=self.shares)
        limits = EngineLimits(
            step_cost=SLOTS, lane_cost=SLOTS, slots=SLOTS, step_units=9, burst=9, max_waiting=8
        )
        self.engine = Engine(limits, self.pool)
        self.model = ToyModel(self.pool)
        self.now = 0.0
        self.alive: list[Sequence] = []
        self.ends: dict[Sequence, int] = {}
        self.step: Step | None = None

    @rule(prompt=PROMPTS, wanted=st.integers(1, 24), priority=st.integers(-1, 1), hurry=st.booleans())
    def submit(self, prompt: list[int], wanted: int, priority: int, hurry: bool) -> None:
        deadline = self.now + (0.5 if hurry else 1e6)
        sequence = chat(prompt, wanted, arrived=self.now, priority=priority, deadline=deadline)
        try:
            self.engine.submit([sequence], self.now)
        except ServingError:
            assert sequence.state is State.NEW
            return
        self.alive.append(sequence)
        self.ends[sequence] = 0

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.engine.cancel(sequence)
        self.engine.cancel(sequence)
        assert not sequence.blocks, "cancel frees before the next step"
        self.ends[sequence] += 1

    @precondition(lambda self: self.step is None)
    @rule()
    def plan(self) -> None:
        self.step = self.engine.plan(self.now)
        self.collect()

    @precondition(lambda self: self.step is not None)
    @rule(fails=st.integers(0, 40))
    def commit(self, fails: int) -> None:
        assert self.step is not None
        self.now += 0.1
        if fails == 0:
            self.engine.fail(self.step, ModelFailed("the step raised"), self.now)
            self.model.rows.clear()
        else:
            advances = self.model.run(self.step)
            if fails == 1 and advances:
                advances[0] = Advance(error=ModelFailed("this one failed"))
            self.engine.commit(self.step, advances, self.now)
        self.step = None
        self.collect()

    def collect(self) -> None:
        for sequence in self.engine.take_ended():
            self.ends[sequence] += 1
            self.alive.remove(sequence)
            if sequence.error is None:
                given = sequence.payload["given"]
                assert given == alone(sequence.tokens[: sequence.prompt], sequence.payload["wanted"])

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        pool = self.pool
        running = [s for s in self.alive if s.state is State.RUNNING]
        assert self.engine.running == len(running)
        assert self.engine.waiting == len(self.alive) - len(running)
        held = {block for sequence in running for block in sequence.blocks} | set(pool._pinned)
        assert len(held) == pool.used
        assert pool.used + pool.available == pool.total
        for block in range(pool.total):
            holders = sum(s.blocks.count(block) for s in running) + pool._pinned.count(block)
            assert pool._holders[block] == holders

    @invariant()
    def a_cached_block_has_its_parent_cached(self) -> None:
        uids = {0} | {content.uid for content in self.pool._contents.values()}
        assert all(content.name[0] in uids for content in self.pool._contents.values())

    @invariant()
    def ends_happen_once(self) -> None:
        assert all(count == (0 if s in self.alive else 1) for s, count in self.ends.items())

    def teardown(self) -> None:
        """Whatever happened, all that is left ends in bounded time, and nothing remains."""
        if self.step is not None:
            self.commit(fails=40)
        work = sum(s.max_units for s in self.alive)
        for _ in range(50 * (work + 20)):
            self.plan()
            if self.step is None:
                break
            self.commit(fails=40)
        assert not self.alive, "somebody starved"
        assert self.pool.used == 0
        assert self.engine.scheduler.free_slots == SLOTS
        assert not self.engine.scheduler.turns.lanes
        self.ends_happen_once()


class CopyingMachine(EngineMachine):
    shares = False


SETTINGS = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("machine", [EngineMachine, CopyingMachine])
def test_no_order_of_events_leaks_starves_or_mixes_texts(machine: type[EngineMachine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=SETTINGS)
