"""Step-wise sequences and endless streams in any order: keys, costs, holds, ends of input."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deployments.core.errors import ModelFailed, ServingError
from deployments.engine.engine import Engine
from deployments.engine.scheduler import EngineLimits
from deployments.engine.sequence import Advance, Sequence, State, Step
from tests.engine.drive import Walker, stream, walk, who

SLOTS, STEP_COST = 6, 3.0
COSTS = st.sampled_from([0.25, 1.0, 1.5, 3.0])


class StepMachine(RuleBasedStateMachine):
    """Few slots and small steps, so that all have to wait for each other."""

    lane_cost = STEP_COST

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(
            EngineLimits(
                step_cost=STEP_COST,
                lane_cost=self.lane_cost,
                slots=SLOTS,
                step_units=SLOTS,
                burst=1,
                max_waiting=8,
            )
        )
        self.model = Walker()
        self.now = 0.0
        self.alive: list[Sequence] = []
        self.ends: dict[Sequence, int] = {}
        self.begun: set[Sequence] = set()  # as the runner saw it
        self.told: dict[Sequence, int] = {}  # as the runner saw it
        self.step: Step | None = None

    def enter(self, sequence: Sequence) -> None:
        try:
            self.engine.submit([sequence], self.now)
        except ServingError:
            assert sequence.state is State.NEW
            return
        self.alive.append(sequence)
        self.ends[sequence] = 0

    @rule(key=st.sampled_from("abc"), cost=COSTS, steps=st.integers(1, 6), hurry=st.booleans())
    def submit(self, key: str, cost: float, steps: int, hurry: bool) -> None:
        deadline = self.now + (0.5 if hurry else 1e9)
        self.enter(walk(steps, key=key, cost=cost, arrived=self.now, deadline=deadline))

    @rule()
    def open(self) -> None:
        self.enter(stream(arrived=self.now))

    def one(self, data: st.DataObject) -> Sequence:
        return self.alive[data.draw(st.integers(0, len(self.alive) - 1))]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), chunks=st.integers(0, 3))
    def feed(self, data: st.DataObject, chunks: int) -> None:
        sequence = self.one(data)
        if sequence.is_open:
            self.engine.feed(sequence, chunks)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def end_input(self, data: st.DataObject) -> None:
        sequence = self.one(data)
        if sequence.is_open:
            self.engine.end_input(sequence)
            self.collect()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), is_held=st.booleans())
    def hold(self, data: st.DataObject, is_held: bool) -> None:
        self.engine.hold(self.one(data), is_held)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = self.one(data)
        self.alive.remove(sequence)
        self.engine.cancel(sequence)
        self.engine.cancel(sequence)
        self.ends[sequence] += 1

    @precondition(lambda self: self.step is None)
    @rule()
    def plan(self) -> None:
        self.step = self.engine.plan(self.now)
        self.collect()
        if self.step is None:
            return
        for sequence in self.step.ended:
            self.told[sequence] = self.told.get(sequence, 0) + 1
        assert len({sequence.key for sequence in who(self.step)}) <= 1
        assert not any(sequence.is_held for sequence in who(self.step))
        assert sum(sequence.cost for sequence in who(self.step)) <= STEP_COST
        assert all(
            work.count == 1 and work.is_last == (work.sequence.remaining == 1) for work in self.step.work
        )

    @precondition(lambda self: self.step is not None)
    @rule(fails=st.integers(0, 30))
    def commit(self, fails: int) -> None:
        assert self.step is not None
        self.begun.update(who(self.step))
        self.now += 0.1
        if fails == 0:
            self.engine.fail(self.step, ModelFailed("the step raised"), self.now)
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
            if sequence.error is None and sequence.payload is not None:
                assert sequence.payload == 0, "a walk ended before its last step"

    @invariant()
    def slots_and_lanes_add_up(self) -> None:
        running = [s for s in self.alive if s.state is State.RUNNING]
        assert self.engine.running == len(running)
        assert self.engine.waiting == len(self.alive) - len(running)
        assert len({s.slot for s in running}) == len(running)
        lanes = self.engine.scheduler.turns.lanes
        assert {s.key for s in self.alive} <= lanes.keys()
        for key, lane in lanes.items():
            mates = [s for s in running if s.key == key]
            assert set(lane.running) == set(mates)
            assert set(lane.ready) == {s for s in mates if s.remaining and not s.is_held}
            assert abs(lane.running_cost - sum(s.cost for s in mates if not s.is_held)) < 1e-9

    @invariant()
    def ends_happen_once(self) -> None:
        assert all(count == (0 if s in self.alive else 1) for s, count in self.ends.items())
        assert all(count == 1 for count in self.told.values())

    def teardown(self) -> None:
        """Once readers are back and inputs end, all end in bounded time, and nothing remains."""
        if self.step is not None:
            self.commit(fails=30)
        for sequence in list(self.alive):
            self.engine.hold(sequence, False)
            if sequence.is_open:
                self.engine.end_input(sequence)
        self.collect()
        for _ in range(200 + sum(s.remaining + (s.payload or 0) for s in self.alive)):
            self.plan()
            if self.step is None:
                break
            self.commit(fails=30)
        assert not self.alive, "somebody starved"
        assert self.engine.scheduler.free_slots == SLOTS
        assert not self.engine.scheduler.turns.lanes
        self.ends_happen_once()
        assert self.begun <= self.told.keys(), "the runner was not told that one left"


class StreamMachine(StepMachine):
    """Every stream has a slot as soon as there is one, and takes turns in the steps."""

    lane_cost = float("inf")


SETTINGS = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_no_order_of_events_leaks_or_starves_step_wise_sequences() -> None:
    run_state_machine_as_test(StepMachine, settings=SETTINGS)


def test_no_order_of_events_leaks_or_starves_streams() -> None:
    run_state_machine_as_test(StreamMachine, settings=SETTINGS)
