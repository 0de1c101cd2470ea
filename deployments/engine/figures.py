"""What an engine's replica measures: totals, the recent past, and what goes to a metrics sink.

Owns: counters and quantiles of steps and streams. Must not know: Prometheus or Ray (a sink does), HTTP.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deployments.core.figures import RECENT, SAMPLE_EVERY_S, quantile
from deployments.engine.engine import Engine
from deployments.engine.sequence import Sequence, Step
from deployments.engine.stream import StepSeconds


@dataclass(slots=True)
class StepTotals:
    """Seconds since start, by part of a step. sample: choosing tokens and making text, part of what the
    model thread does; 0 for models that do neither."""

    schedule: float = 0.0
    run: float = 0.0
    sample: float = 0.0
    send: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineMoment:
    """What is sent about once a second: gauges now, and what was counted since the last time."""

    running: int
    waiting: int
    streams: int
    kv_used_share: float
    cached_share: float
    steps: int
    units: int
    preemptions: int
    requests: Mapping[tuple[int, str], int]


class EngineSink(Protocol):
    """Where measurements go; cheap, never raising. Steps and streams are sampled (core/figures.py)."""

    def observe_step(self, step: Step, seconds: StepTotals) -> None: ...

    def observe_first(self, seconds: float) -> None:
        """From a sequence's arrival to its first output."""
        ...

    def observe_gap(self, seconds: float) -> None:
        """Between two steps' outputs of one sequence."""
        ...

    def send(self, moment: EngineMoment) -> None: ...


class NoEngineSink:
    """For tests and offline use."""

    def observe_step(self, step: Step, seconds: StepTotals) -> None:
        pass

    def observe_first(self, seconds: float) -> None:
        pass

    def observe_gap(self, seconds: float) -> None:
        pass

    def send(self, moment: EngineMoment) -> None:
        pass


@dataclass(slots=True)
class _Recent:
    first_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    gap_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    units: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    sequences: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


class EngineFigures:
    """The observer of an EngineLoop. One event loop; not thread-safe.

    sample_s: seconds that the runner's last step spent on choosing tokens and making text.
    """

    def __init__(self, sink: EngineSink, clock: Callable[[], float], sample_s: Callable[[], float]) -> None:
        self.started = clock()
        self.statuses: Counter[int] = Counter()
        self.step_s = StepTotals()
        self.recent = _Recent()
        self._sink, self._clock, self._sample_s = sink, clock, sample_s
        self._unsent: Counter[tuple[int, str]] = Counter()
        self._next_step = self._next_gap = self.started
        self._sent = (0, 0, 0)

    def on_step(self, step: Step, seconds: StepSeconds) -> None:
        sample_s = min(self._sample_s(), seconds.run) if step.work else 0.0
        parts = StepTotals(seconds.schedule, seconds.run - sample_s, sample_s, seconds.send)
        total = self.step_s
        total.schedule += parts.schedule
        total.run += parts.run
        total.sample += parts.sample
        total.send += parts.send
        if not step.work:
            return
        self.recent.units.append(step.units)
        self.recent.sequences.append(len(step.work))
        self.recent.step_s.append(seconds.schedule + seconds.run + seconds.send)
        now = self._clock()
        if now >= self._next_step:
            self._next_step = now + SAMPLE_EVERY_S
            self._sink.observe_step(step, parts)

    def on_outputs(self, sequence: Sequence, count: int, gap_s: float | None) -> None:
        now = self._clock()
        if gap_s is None:
            first_s = now - sequence.arrived
            self.recent.first_s.append(first_s)
            self._sink.observe_first(first_s)
            return
        self.recent.gap_s.append(gap_s)
        if now >= self._next_gap:
            self._next_gap = now + SAMPLE_EVERY_S
            self._sink.observe_gap(gap_s)

    def count_request(self, status: int, route: str) -> None:
        self.statuses[status] += 1
        self._unsent[status, route] += 1

    def send(self, engine: Engine, streams: int) -> None:
        """Call about once a second."""
        counters, pool = engine.counters, engine.scheduler.pool
        preemptions = engine.scheduler.preemptions
        steps, units, before = self._sent
        self._sent = (counters.steps, counters.units, preemptions)
        unsent, self._unsent = self._unsent, Counter()
        self._sink.send(
            EngineMoment(
                running=engine.running,
                waiting=engine.waiting,
                streams=streams,
                kv_used_share=pool.used / pool.total if pool else 0.0,
                cached_share=counters.cached_units / max(1, counters.prompt_units),
                steps=counters.steps - steps,
                units=counters.units - units,
                preemptions=preemptions - before,
                requests=unsent,
            )
        )

    def recent_json(self) -> dict[str, float]:
        """Quantiles over the last 2,048 of each; zeros before the first."""
        recent = self.recent
        first_s, gap_s, step_s = sorted(recent.first_s), sorted(recent.gap_s), sorted(recent.step_s)
        return {
            "ttft_ms_p50": 1e3 * quantile(first_s, 0.50),
            "ttft_ms_p99": 1e3 * quantile(first_s, 0.99),
            "gap_ms_p50": 1e3 * quantile(gap_s, 0.50),
            "gap_ms_p99": 1e3 * quantile(gap_s, 0.99),
            "step_ms_p50": 1e3 * quantile(step_s, 0.50),
            "units_per_step_mean": _mean(recent.units),
            "sequences_per_step_mean": _mean(recent.sequences),
        }


def _mean(values: "deque[int]") -> float:
    return sum(values) / len(values) if values else 0.0
