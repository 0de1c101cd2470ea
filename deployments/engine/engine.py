"""The engine: sequences in, steps out, and what became of them back in. Three beats a step:

    plan    who runs next (scheduler.py)
    run     the runner's, on the model thread
    commit  what the run made of each sequence

Owns: the life of a sequence (waiting, running, ended exactly once), the door, the counters. Sans-IO: no
clock, thread, await or tensor; `now` is the caller's monotonic time in seconds, never running backwards.
Only one step is under way at a time; sequences may enter and leave meanwhile.
"""

import heapq
import itertools
import math
from collections.abc import Sequence as Values
from copy import copy
from dataclasses import dataclass

from deployments.core.errors import (
    ContextLengthExceeded,
    DeadlinePassed,
    Draining,
    InvalidItem,
    Overloaded,
    ServingError,
)
from deployments.engine.blocks import BlockPool
from deployments.engine.scheduler import EngineLimits, Scheduler
from deployments.engine.sequence import Advance, Sequence, State, Step

RATE_MEMORY = 0.9


@dataclass(slots=True)
class Counters:
    """Since start. units: work done (tokens, chunks, steps), what was preempted and redone included.

    cached_units: not done because the prefix cache had them, of prompt_units.
    """

    steps: int = 0
    units: int = 0
    begun: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    prompt_units: int = 0
    cached_units: int = 0


class Engine:
    """One replica's sequences. Not thread-safe: one event loop owns it."""

    def __init__(self, limits: EngineLimits, pool: BlockPool | None = None) -> None:
        self.scheduler = Scheduler(limits, pool)
        self.counters = Counters()
        self.is_draining = False
        self.max_queue_s = math.inf
        self._serials = itertools.count()
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; who began or left stays till then
        self._left: list[Sequence] = []  # had begun; the runner has not been told yet
        self._ended: list[Sequence] = []  # ended by the engine; the caller has not been told yet
        self._begin_every_s: float | None = None  # while others waited
        self._queue_since: float | None = None  # the last begin, or the queue's own, while others wait
        self._most_cost = min(limits.step_cost, limits.lane_cost)  # as built: warm-up may lower both

    @property
    def limits(self) -> EngineLimits:
        return self.scheduler.limits

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return self.limits.slots - self.scheduler.free_slots

    def forget(self) -> None:
        """After warm-up: counters and the prefix cache begin anew; what was learned of steps stays."""
        self.counters = Counters()
        self.scheduler.preemptions = 0
        self._begin_every_s = self._queue_since = None
        if self.scheduler.pool is not None:
            self.scheduler.pool.forget()

    # -- the door ---------------------------------------------------------------------------------------

    def check_room(self, now: float, sequences: int, *, timeout_s: float = math.inf) -> None:
        """Raise Draining or Overloaded where `sequences` more would not be let in now."""
        if self.is_draining:
            raise Draining("this server is stopping; send the request to another", retry_after_s=1)
        wait_s = self.predicted_wait_s()  # of the first: with it their request has begun
        allowed_s = max(0.0, min(timeout_s, self.max_queue_s))  # a deadline that has passed: see _expire
        if self._ahead(sequences) > self.limits.max_waiting:
            reason = f"{self.waiting} sequences wait already (max_queue_items {self.limits.max_waiting})"
        elif wait_s > allowed_s:
            reason = f"it would begin in about {wait_s:.1f} s, over the {allowed_s:g} s allowed"
        else:
            return
        self.counters.refused += sequences
        raise Overloaded(reason, retry_after_s=max(1, math.ceil(min(wait_s, 60.0))))

    def predicted_wait_s(self) -> float:
        """Until a newcomer would begin, from the rate at which others began."""
        return max(0, self._ahead(1)) * (self._begin_every_s or 0.0)

    def _ahead(self, newcomers: int) -> int:
        """Of those that wait and `newcomers`, how many can't begin at once."""
        is_queue = self.waiting and self._queue_since is not None  # nobody gets past it, places or not
        return self.waiting + newcomers - (0 if is_queue else self.scheduler.places)

    def submit(self, sequences: Values[Sequence], now: float) -> None:
        """Queue all or none. Raises what `check_room` raises, and InvalidItem for what never fits."""
        for sequence in sequences:
            self.check_fits(sequence)
        timeout_s = min(sequence.deadline - now for sequence in sequences)
        self.check_room(now, len(sequences), timeout_s=timeout_s)
        if not self.waiting:  # all of the queue left, or began: nothing to learn from its time
            self._queue_since = None
        for sequence in sequences:
            sequence.siblings = sequences
            sequence.serial = next(self._serials)
            sequence.prompt = sequence.known
            self.scheduler.enter(sequence)
            if sequence.deadline < math.inf:
                self._push_deadline(sequence)

    def check_fits(self, sequence: Sequence) -> None:
        """Raise InvalidItem for what could never run here. Any thread."""
        if not sequence.cost <= self._most_cost:
            raise InvalidItem(
                f"this sequence costs {sequence.cost:g}, a step holds {self._most_cost:g} at most "
                "(max_sequences)"
            )
        pool = self.scheduler.pool
        if pool is not None and pool.needed(sequence.max_units) > pool.total:
            raise ContextLengthExceeded(
                f"prompt and output of {sequence.max_units} tokens don't fit this server's KV memory of "
                f"{pool.total * pool.units} tokens (kv_bytes): shorten the prompt, or lower max_tokens"
            )

    def _push_deadline(self, sequence: Sequence) -> None:
        if len(self._deadlines) > 2 * self.waiting + 64:
            self._deadlines = [entry for entry in self._deadlines if _may_expire(entry[2])]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (sequence.deadline, sequence.serial, sequence))

    # -- while it lives -----------------------------------------------------------------------------------

    def feed(self, sequence: Sequence, units: int) -> None:
        """More input for an open sequence."""
        if sequence.state is not State.ENDED:
            sequence.known += units
            self._refresh(sequence)

    def end_input(self, sequence: Sequence) -> None:
        """No more input comes; without work left it is finished now."""
        sequence.is_open = False
        if sequence.state is not State.ENDED and not sequence.remaining:
            self._finish(sequence)

    def hold(self, sequence: Sequence, is_held: bool) -> None:
        """A held sequence sits out: its consumer is behind. It keeps its slot."""
        sequence.is_held = is_held
        if sequence.state is not State.ENDED:
            self._refresh(sequence)

    def _refresh(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self.scheduler.turns.lane(sequence.key).refresh(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """The consumer left: slot and blocks are free from now on. Idempotent."""
        if sequence.state is not State.ENDED:
            self.counters.cancelled += 1
            self._leave(sequence, keeps=True)

    def take_ended(self) -> list[Sequence]:
        """Sequences that the engine itself ended since the last call; `error` says why, None: done."""
        ended, self._ended = self._ended, []
        return ended

    # -- the three beats ----------------------------------------------------------------------------------

    def plan(self, now: float) -> Step | None:
        """The next step, to be run and committed before the next plan; None: there is nothing to do.

        Its work may be empty, where all that is to do is to let go of who left.
        """
        self._expire(now)
        if self.scheduler.pool is not None:
            self.scheduler.pool.unpin()
        draft = self.scheduler.draft(now)
        self._note_begun(now)
        saves, self.scheduler.saves = self.scheduler.saves, []
        freed, self.scheduler.freed = self.scheduler.freed, []
        left, self._left = self._left, []
        if draft is None:
            if saves or freed or left:
                return Step([], saves, freed, left, [], "", now)
            return None
        return Step(draft.work, saves, freed, left, draft.loads, draft.lane.key, now)

    def _expire(self, now: float) -> None:
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            self.counters.expired += 1
            waited_ms = 1e3 * (sequence.deadline - sequence.arrived)
            error = DeadlinePassed(
                f"not begun within {waited_ms:.0f} ms: allow more time (timeout_ms), or try later"
            )
            self._end(sequence, error)

    def next_deadline(self) -> float | None:
        """When `plan` must be called though nothing happens."""
        while self._deadlines and not _may_expire(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _note_begun(self, now: float) -> None:
        begun, self.scheduler.begun = self.scheduler.begun, []
        self._learn_rate(len(begun), now)
        self.counters.begun += len(begun)
        for sequence in begun:
            if sequence.max_units:
                self.counters.prompt_units += sequence.prompt
                self.counters.cached_units += sequence.cached

    def _learn_rate(self, begun: int, now: float) -> None:
        """Time without a queue says nothing about how fast one moves."""
        if begun and self._queue_since is not None:
            every_s = (now - self._queue_since) / begun
            known = every_s if self._begin_every_s is None else self._begin_every_s
            self._begin_every_s = RATE_MEMORY * known + (1.0 - RATE_MEMORY) * every_s
        if not self.waiting:
            self._queue_since = None
        elif begun or self._queue_since is None:
            self._queue_since = now

    def commit(self, step: Step, advances: Values[Advance], now: float) -> None:
        """The step was run. Ended sequences are in `take_ended` afterwards."""
        self._account(step, now)
        for work, advance in zip(step.work, advances, strict=True):
            sequence = work.sequence
            if sequence.state is State.RUNNING:  # else it left meanwhile
                self._advance(sequence, work.count, advance)

    def fail(self, step: Step, error: ServingError, now: float) -> None:
        """The run raised: its sequences end with `error`, and the cache is not to be trusted."""
        self._account(step, now)
        for work in step.work:
            if work.sequence.state is State.RUNNING:
                self.counters.failed += 1
                self._end(work.sequence, copy(error), keeps=False)
        if self.scheduler.pool is not None:
            self.scheduler.saves.clear()
            self.scheduler.pool.forget()

    def _account(self, step: Step, now: float) -> None:
        self.counters.steps += 1
        self.counters.units += step.units
        turns = self.scheduler.turns
        if step.work:
            elapsed_s = now - step.planned
            turns.charge(turns.lane(step.key), elapsed_s)
            chunk = sum(work.count for work in step.work if work.count > 1)
            talking = sum(work.count == 1 for work in step.work)
            self.scheduler.pace.observe(talking, chunk, elapsed_s)

    def _advance(self, sequence: Sequence, count: int, advance: Advance) -> None:
        is_past_prompt = sequence.computed < sequence.prompt <= sequence.computed + count
        sequence.computed += count
        sequence.known += advance.units
        if advance.token is not None:
            sequence.tokens.append(advance.token)
        if advance.error is not None:
            self.counters.failed += 1
            self._end(sequence, advance.error, keeps=False)
        elif advance.is_done or not (sequence.remaining or sequence.is_open):
            self._finish(sequence)
        else:
            lane = self.scheduler.turns.lane(sequence.key)
            lane.ready.pop(sequence, None)  # who stepped goes last
            lane.refresh(sequence)
            pool = self.scheduler.pool
            if pool is not None and is_past_prompt:
                self.scheduler.saves += pool.publish(sequence)

    # -- ends -----------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        self.counters.finished += 1
        self._end(sequence, None)

    def _end(self, sequence: Sequence, error: ServingError | None, *, keeps: bool = True) -> None:
        sequence.error = error
        self._leave(sequence, keeps=keeps)
        self._ended.append(sequence)

    def _leave(self, sequence: Sequence, *, keeps: bool) -> None:
        self.scheduler.leave(sequence, keeps=keeps)
        if sequence.began is not None:
            self._left.append(sequence)


def _may_expire(sequence: Sequence) -> bool:
    """A request is in time once one of its sequences has begun: what it waits for then is itself."""
    return sequence.state is State.WAITING and all(one.began is None for one in sequence.siblings)
