"""The rules of a step: who runs, for how much, who must give way. All of them are on this page.

1. One step holds sequences of one key; keys take turns by time used (lanes.py).
2. Sequences that need one unit (they talk, or have a chunk) go first, those that stepped longest ago
   before others, up to `step_cost`. None of them waits for a prompt.
3. What is left of the step's units goes to prompts that have begun, oldest first, in chunks that
   don't stall those that talk (pace.py).
4. Then newcomers get slots: best rank first (priority, improved by age; then arrival), and nobody
   overtakes one who only lacks memory. A newcomer needs blocks for all that is known of it, and a spare
   one for each that runs, so that it isn't let in only to be thrown out. Without KV memory a slot costs
   nothing: it is given where the key has a place, and the newcomer joins those that take turns.
5. Where memory is short, the worst rank of those that run gives its blocks back and waits again, first
   in its line. Its tokens are kept and computed anew (or found in the cache). The best rank is never
   thrown out, and fits alone (rule 6): so there is always progress.
6. What could never fit, by cost or by memory, is refused at the door.

Owns: these decisions, as a function of state and `now`. Must not know: clocks, threads, tensors.
"""

import heapq
from dataclasses import dataclass, field

from deployments.engine.blocks import BlockPool
from deployments.engine.lanes import Lane, Turns, rank
from deployments.engine.pace import Pace
from deployments.engine.sequence import Copy, Sequence, State, Work


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """step_cost: cost of the sequences that share a step. lane_cost: of those of one key that run, that
    is, have a slot, and are not held. slots: of all keys together. step_units: of a step; burst: of one
    sequence in a step. max_waiting: sequences without a slot."""

    step_cost: float = 16.0
    lane_cost: float = 16.0
    slots: int = 16
    step_units: int = 256
    burst: int = 256
    max_waiting: int = 1024


@dataclass(slots=True)
class Draft:
    """A step while it is put together."""

    lane: Lane
    work: list[Work] = field(default_factory=list)
    loads: list[Copy] = field(default_factory=list)
    cost: float = 0.0
    budget: int = 0  # units that prompts and newcomers may still take
    has_preempted: bool = False


class Scheduler:
    """Slots, blocks and turns of one engine.

    waiting: all without a slot. begun: got their first slot since the caller emptied it. saves, freed:
    for the next step.
    """

    def __init__(self, limits: EngineLimits, pool: BlockPool | None) -> None:
        self.limits = limits
        self.pool = pool
        self.turns = Turns()
        self.pace = Pace(limits.step_units)
        self.waiting: dict[Sequence, None] = {}
        self.begun: list[Sequence] = []
        self.saves: list[Copy] = []
        self.freed: list[int] = []
        self.preemptions = 0
        self._slots = list(range(limits.slots))  # a heap: rows in use lie close together

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def places(self) -> int:
        """Newcomers of cost 1 that could begin now, memory aside; of several keys, those of the fullest."""
        running_cost = sum(lane.running_cost for lane in self.turns.lanes.values())
        return int(min(len(self._slots), max(0.0, self.limits.lane_cost - running_cost)))

    def enter(self, sequence: Sequence) -> None:
        """Into the line of its key."""
        sequence.state = State.WAITING
        self.waiting[sequence] = None
        self.turns.lane(sequence.key).wait(sequence)

    def leave(self, sequence: Sequence, *, keeps: bool = True) -> None:
        """Out, wherever it is; slot and blocks are free at once. `keeps`: its blocks may be cached."""
        lane = self.turns.lane(sequence.key)
        if sequence.state is State.RUNNING:
            self._stop(sequence, lane, keeps=keeps)
        else:
            lane.leave(sequence)
            del self.waiting[sequence]
        sequence.state = State.ENDED
        self.turns.prune(lane)

    def draft(self, now: float) -> Draft | None:
        """The next step's work; None where nobody can step."""
        for lane in self.turns.in_order():
            draft = Draft(lane)
            self._continue(draft, now)
            self._admit(draft, now)
            if draft.work or draft.loads:
                return draft
        return None

    # -- rules 2, 3 and 5 --------------------------------------------------------------------------

    def _continue(self, draft: Draft, now: float) -> None:
        talking: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in draft.lane.ready:
            needs_one = sequence.remaining == 1 or self.limits.burst == 1
            (talking if needs_one else prompts).append(sequence)
        if self.pool is not None:  # so that who gives way has not been served yet
            talking.sort(key=lambda sequence: rank(sequence, now))
        for sequence in talking:
            if not self._has_room(draft, sequence):
                break
            if sequence.state is State.RUNNING and self._has_blocks(sequence, draft, now):
                self._add(draft, sequence, 1)
        draft.budget = self._prompt_units(len(draft.work))
        for sequence in sorted(prompts, key=lambda sequence: rank(sequence, now)):
            if sequence.state is State.RUNNING:
                draft.budget -= self._add(draft, sequence, draft.budget)

    def _prompt_units(self, talking: int) -> int:
        if self.limits.burst == 1:  # there are no prompts: newcomers need one unit, as all do
            return self.limits.step_units - talking
        return self.pace.chunk(talking)

    def _has_room(self, draft: Draft, sequence: Sequence) -> bool:
        """Alone, a sequence may cost more than is useful to share a step (the door knows the bound)."""
        return not draft.work or draft.cost + sequence.cost <= self.limits.step_cost

    def _add(self, draft: Draft, sequence: Sequence, most: int) -> int:
        """Give it work for at most `most` units; how many."""
        count = min(most, sequence.remaining, self.limits.burst)
        if count <= 0 or not self._has_room(draft, sequence):
            return 0
        is_last = count == sequence.remaining
        draft.work.append(Work(sequence, sequence.computed, count, is_last, sequence.blocks))
        draft.cost += sequence.cost
        return count

    def _has_blocks(self, sequence: Sequence, draft: Draft, now: float) -> bool:
        """Blocks for its next unit, taken from the worst rank where there are none."""
        while self.pool is not None and not self.pool.grow(sequence, sequence.known):
            worst = max(draft.lane.running, key=lambda other: rank(other, now))
            self._preempt(worst, draft.lane)
            draft.has_preempted = True
            if worst is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, lane: Lane) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._stop(sequence, lane)
        sequence.state = State.WAITING
        self.waiting[sequence] = None
        lane.wait(sequence, first=True)

    def _stop(self, sequence: Sequence, lane: Lane, *, keeps: bool = True) -> None:
        lane.stop(sequence)
        heapq.heappush(self._slots, sequence.slot)
        self.freed.append(sequence.slot)
        if self.pool is not None:
            self.saves += self.pool.release(sequence, keeps=keeps)

    # -- rule 4 --------------------------------------------------------------------------------------

    def _admit(self, draft: Draft, now: float) -> None:
        while self._slots and not draft.has_preempted:
            sequence = draft.lane.next(now)
            if sequence is None or not self._has_place(sequence, draft):
                return
            matched: list[int] | None = []
            if self.pool is not None:
                matched = self.pool.match(sequence, spare=len(draft.lane.running))
            if matched is None:
                return
            self._start(sequence, draft, matched, now)
            if not sequence.is_held:
                draft.budget -= self._add(draft, sequence, draft.budget)

    def _has_place(self, sequence: Sequence, draft: Draft) -> bool:
        running_cost = draft.lane.running_cost
        if running_cost and running_cost + sequence.cost > self.limits.lane_cost:
            return False
        return self.pool is None or (draft.budget > 0 and self._has_room(draft, sequence))

    def _start(self, sequence: Sequence, draft: Draft, matched: list[int], now: float) -> None:
        draft.lane.leave(sequence)
        del self.waiting[sequence]
        sequence.slot = heapq.heappop(self._slots)
        sequence.state = State.RUNNING
        draft.lane.start(sequence)
        if self.pool is not None:
            draft.loads += self.pool.open(sequence, matched)
        if sequence.began is None:
            sequence.began, sequence.cached = now, sequence.computed
            self.begun.append(sequence)
        draft.lane.refresh(sequence)
