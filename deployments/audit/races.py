"""Whether calls that overlap give what each gives alone: the search for a schedule that proves they don't.

Owns: which schedules are tried in which order, and what counts as a difference. Must not know: what is called
(a model's instance, two copies of it), processes, reports. Source: DESIGN, "The audit": operators and lines,
lockstep and overlap, each alone and together, caught 23 of 24 unsafe models and accused none of 39 safe ones.

A reference is a call made alone under the same instruments: bits are compared, and a kernel may give others
where its caller is watched. After each schedule all answers are looked at once more, since one may be a
view of memory that a later call writes, and each call is made once more alone, since the schedule may have
spoilt what the model keeps.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deployments.audit.forks import Isolate, here
from deployments.audit.instruments import Instruments, instrumented
from deployments.audit.randomness import seed_all
from deployments.audit.sameness import first_difference, same, snapshot
from deployments.audit.schedules import Inside, Lockstep, Meet, Overlap
from deployments.audit.trials import Finding, Trial
from deployments.audit.turns import Ended, Stuck, Turns

Call = Callable[[], Any]
KINDS = (Instruments.BOTH, Instruments.OPERATORS, Instruments.LINES)
STRIDES = (1, 3, 2, 5, 8)
OVERLAPS = 40
SIMPLEST = 60
"""Places looked at for a simpler story of a race that was found."""
DEADLOCK = "waits for ever: a deadlock"
NEAREST = 16
"""Places where the second call is put inside the first before all else: the plainest races."""
MEETINGS = 24
"""Lines and operators that both calls of a pair come to, at which they are brought together."""
SLOWER = 4
"""Times fewer of both, and of the strides before them, where calls are slow."""
INSIDES = 8
"""Places where one whole call is put inside another, spread over its points; lockstep comes close to all."""
STORM = 9
"""Calls in flight in the storm: ring buffers of two to eight rooms look safe to a pair."""
STORM_OF_SLOW = 5
LATER = 4
"""Of a slow model one call in so many is made once more after an overlap."""
FEW_OPCODES = 3000
"""Of a call's own Python code: where there are more, a pause before each takes too long."""


class Races:
    """The trials of a few calls, which raise nothing when made alone.

    calls: share whatever is under test; or a function that makes them anew, with all that they share, for
    each trial and each reference: for what only happens once, and for models that keep something. isolate:
    the same without making them anew: each trial and each reference runs in it. reseeds:
    the model draws random numbers; at each pause all generators are seeded from the call and how far it is,
    so that what it draws doesn't depend on the others. one_each: even calls belong to one instance, odd
    ones to another, and an instance has one call at a time.
    """

    def __init__(
        self,
        calls: Sequence[Call] | Callable[[], Sequence[Call]],
        *,
        isolate: Isolate | None = None,
        reseeds: bool = False,
        one_each: bool = False,
        is_slow: bool = False,
    ) -> None:
        self._make = calls if callable(calls) else None
        self._isolate: Isolate = isolate or here
        self._is_afresh = self._make is not None or isolate is not None
        self._calls: Sequence[Call] = calls() if callable(calls) else list(calls)
        self._reseeds, self._one_each = reseeds, one_each
        self._alone: dict[tuple[int, Instruments], tuple[Any, list[str]]] = {}
        self._plain: dict[int, Ended] = {}
        self._is_slow = is_slow
        self.runs = 0
        self.on_trial: Callable[[Trial], None] = lambda trial: None

    def search(self, *, seed: int = 0, has_time: Callable[[], bool] = lambda: True) -> Finding | None:
        """The first trial that differs, tried from the most telling on; None where none did in time."""
        for trial in self.trials(seed):
            if not has_time():
                return None
            found = self.run(trial)
            if found is not None:
                return self._simplest(found, has_time)
        return None

    def _simplest(self, found: Finding, has_time: Callable[[], bool]) -> Finding:
        """The same difference by one call put whole inside one pause of another, where that does it: a
        reader can follow it."""
        is_told = isinstance(found.trial.schedule, Inside) or found.how.startswith(DEADLOCK)
        if is_told or len(found.trial.calls) != 2:
            return found
        instruments = found.trial.instruments
        for point in self._places(found.trial.calls[0], instruments, SIMPLEST):
            if not has_time():
                break
            simple = self.run(Trial(found.trial.calls, instruments, Inside((point,))))
            if simple is not None:
                return simple
        return found

    def trials(self, seed: int) -> Iterator[Trial]:
        """Pairs of calls, and a call with itself, by every instrument; the telling ones first."""
        rng = random.Random(seed)
        pairs = self._pairs()
        fewer = SLOWER if self._is_slow else 1
        for point in self._places(pairs[0][0], Instruments.BOTH, NEAREST // fewer):
            yield Trial(pairs[0], Instruments.BOTH, Inside((point,)))
        last = len(self._calls) - 1  # the largest batch, against one item
        for stride in STRIDES[: len(STRIDES) // fewer] if last else ():
            yield Trial((last, 0), Instruments.BOTH, Lockstep(stride))
        if not self._one_each and not self._is_afresh:
            yield from self._storm(Instruments.BOTH, INSIDES // fewer)
        for meet in self._meetings((last, 0), Instruments.BOTH, MEETINGS // fewer):
            yield Trial((last, 0), Instruments.BOTH, meet)
        for strides in (STRIDES[:2], STRIDES[2:]):
            for stride in strides:
                for pair in pairs:
                    for instruments in KINDS:
                        yield Trial(pair, instruments, Lockstep(stride))
            if strides == STRIDES[:2] and not self._one_each:
                for instruments in KINDS[0 if self._is_afresh else 1 :]:
                    yield from self._storm(instruments, INSIDES)
        for number in range(OVERLAPS):
            for instruments in KINDS:
                share = (0.05, 0.2, 0.5)[number % 3]
                yield Trial(rng.choice(pairs), instruments, Overlap(rng.getrandbits(32), share))
        for instruments in KINDS:
            for pair in pairs:
                for point in self._places(pair[0], instruments, INSIDES):
                    yield Trial(pair, instruments, Inside((point,)))
        yield from self._between_opcodes(pairs)

    def _between_opcodes(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Trial]:
        """Within a line the interpreter's lock may change hands, too."""
        opcodes = Instruments.OPCODES
        for pair in pairs:
            if len(self._reference(pair[0], opcodes)[1]) <= FEW_OPCODES:
                for stride in (1, 4):
                    yield Trial(pair, opcodes, Lockstep(stride))
                for point in self._places(pair[0], opcodes, SIMPLEST):
                    yield Trial(pair, opcodes, Inside((point,)))

    def _storm(self, instruments: Instruments, most: int) -> Iterator[Trial]:
        # The first call differs from all the others: whichever takes its room shows.
        others = max(1, len(self._calls) - 1)
        size = STORM_OF_SLOW if self._is_slow else STORM
        order = (0, *(min(len(self._calls) - 1, 1 + number % others) for number in range(size - 1)))
        for point in self._places(0, instruments, most):
            yield Trial(order, instruments, Inside((point,) * (size - 1)))

    def run(self, trial: Trial, *, looks_later: bool = False) -> Finding | None:
        """What of the trial differs from the calls alone; raises what a call alone raises. looks_later: each
        call is made once more, of a slow model too."""
        self.on_trial(trial)
        expected = [self._reference(number, trial.instruments)[0] for number in trial.calls]
        self.runs += 1
        found: Finding | None = self._isolate(lambda: self._run(trial, expected, looks_later))
        return found

    def _run(self, trial: Trial, expected: Sequence[Any], looks_later: bool) -> Finding | None:
        calls = self._calls if self._make is None else self._make()
        turns = Turns(trial.schedule)
        try:
            ended = turns.run(
                [self._instrumented(calls[n], n, trial.instruments, turns) for n in trial.calls]
            )
        except Stuck as stuck:
            return Finding(trial, 0, f"{DEADLOCK}, {stuck}", turns.points)
        firsts = [snapshot(end.value) for end in ended]
        for thread, number in enumerate(trial.calls):
            how = _difference(ended[thread], firsts[thread], expected[thread])
            is_later = looks_later or not self._is_slow or (self.runs + thread) % LATER == 0
            if not how and not self._is_afresh and is_later:
                how = self._difference_later(number, ended[thread].value, firsts[thread])
            if how:
                values = first_difference(expected[thread], firsts[thread])
                return Finding(trial, thread, how, turns.points, values)
        return None

    def _difference_later(self, number: int, answer: Any, first: Any) -> str:
        """How a call made once more, alone and not watched, differs; or what it did to the answer of
        before.
        """
        later = self._made_plain(number)
        if not same(answer, first):
            return "gave an answer that changed afterwards: it shares memory with what later calls write"
        if later.error is not None:
            raised = f"{type(later.error).__name__}: {later.error}"
            return f"raised when it was called again, alone: {raised}"[:300]
        if not same(later.value, self._plain[number].value):
            return (
                "gave another answer when it was called again, alone: the overlap spoilt what the model keeps"
            )
        return ""

    # -- one call ---------------------------------------------------------------------------------------

    def _instrumented(self, call: Call, number: int, instruments: Instruments, turns: Turns) -> Call:
        count = 0

        def pause(what: str) -> None:
            nonlocal count
            turns.pause(what)
            count += 1
            if self._reseeds:
                seed_all(1000 * number + count)

        def run() -> Any:
            if self._reseeds:
                seed_all(1000 * number)
            with instrumented(pause, instruments):
                return call()

        return run

    def _reference(self, number: int, instruments: Instruments) -> tuple[Any, list[str]]:
        """(the call's answer alone, its points)."""
        if number not in self._plain and not self._is_afresh:
            self._plain[number] = self._made_plain(number)
        known = self._alone.get((number, instruments))
        if known is None:
            known = self._isolate(lambda: self._made_alone(number, instruments))
            self._alone[number, instruments] = known
        return known

    def _made_plain(self, number: int) -> Ended:
        """As it is served: no pauses, which a large model takes ten times as long with."""
        if self._reseeds:
            seed_all(1000 * number)
        try:
            return Ended(snapshot(self._calls[number]()))
        except Exception as error:
            return Ended(error=error)

    def _made_alone(self, number: int, instruments: Instruments) -> tuple[Any, list[str]]:
        calls = self._calls if self._make is None else self._make()
        turns = Turns(Lockstep(1))
        (end,) = turns.run([self._instrumented(calls[number], number, instruments, turns)])
        if end.error is not None:
            raise end.error
        return snapshot(end.value), [point.what for point in turns.points]

    # -- which ------------------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[int, int]]:
        """Neighbours in both orders, and the first with itself."""
        count = len(self._calls)
        pairs = [(n, (n + 1) % count) for n in range(count)] if count > 1 else []
        return [*pairs, *((b, a) for a, b in pairs if count == 2), *([] if self._one_each else [(0, 0)])]

    def _places(self, number: int, instruments: Instruments, most: int) -> list[int]:
        points = len(self._reference(number, instruments)[1])
        return list(range(1, points + 1, max(1, -(-points // most))))

    def _meetings(self, pair: tuple[int, int], instruments: Instruments, most: int) -> list[Meet]:
        """Where both come to one line or operator for the first time, spread over the call."""
        firsts, seconds = (_firsts(self._reference(number, instruments)[1]) for number in pair)
        both = [Meet((first, seconds[what])) for what, first in firsts.items() if what in seconds]
        return both[:: max(1, -(-len(both) // most))]


def _firsts(points: Sequence[str]) -> dict[str, int]:
    """The number of each point's first time, counted from 1."""
    found: dict[str, int] = {}
    for number, what in enumerate(points, start=1):
        found.setdefault(what, number)
    return found


def _difference(end: Ended, first: Any, wanted: Any) -> str:
    """How a call's end differs from the call alone; "" where it does not."""
    if end.error is not None:
        return f"raised {type(end.error).__name__}: {end.error}"[:300]
    if not same(first, wanted):
        return "gave another answer than alone"
    if not same(end.value, first):
        return "gave an answer that changed afterwards: it shares memory with what later calls write"
    return ""
