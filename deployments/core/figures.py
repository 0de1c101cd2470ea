"""A replica's figures: counted once here, shown by /stats and sent to a metrics sink.

Owns: counters and the recent past. Must not know: Prometheus or Ray (a sink does).
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.core.batcher import BatchReport
from deployments.core.submission import Batch

SAMPLE_EVERY_S = 0.05
"""At most this often a batch goes into the histograms: Ray's agent plays every single observation
again, 0.1 ms of CPU each. Totals are exact: they are counted here and sent once a second."""
RECENT = 2048
"""Waits and batches kept for the quantiles in /stats: a few seconds at full load, 16 kB."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a replica holds now. instances: that take batches. failures: batches out of memory since start.

    max_batch_cost: in force; None: items alone bound a batch.
    """

    instances: int = 1
    memory_bytes: int = 0
    failures: int = 0
    max_batch_cost: float | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """What is sent about once a second: gauges now, and what was counted since the last time."""

    queue_items: int
    queue_cost: float
    slot_busy_share: float
    items: int
    batches: int
    requests: Mapping[tuple[int, str], int]
    held: Held
    out_of_memory: int


class MetricsSink(Protocol):
    """Where measurements go; cheap, never raising."""

    def observe_batch(self, batch: Batch, report: BatchReport, wait_s: float) -> None:
        """One sampled batch, and how long one of its items waited."""
        ...

    def send(self, moment: Moment) -> None: ...


class NullSink:
    """For tests and offline use."""

    def observe_batch(self, batch: Batch, report: BatchReport, wait_s: float) -> None:
        pass

    def send(self, moment: Moment) -> None:
        pass


class Figures:
    """Totals since start, quantiles of the recent past. One event loop; not thread-safe."""

    def __init__(self, sink: MetricsSink, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._clock = clock
        self.started = clock()
        self.statuses: Counter[int] = Counter()
        self.batches = self.items = self.splits = 0
        self.busy_s = self.cost = 0.0
        self._waits_s: deque[float] = deque(maxlen=RECENT)
        self._sizes: deque[int] = deque(maxlen=RECENT)
        self._padding: deque[float] = deque(maxlen=RECENT)
        self._next_sample = self.started
        self._sent = (self.started, 0.0, 0, 0, 0)  # when, busy_s, items, batches, out of memory
        self._unsent: Counter[tuple[int, str]] = Counter()

    def on_batch(self, batch: Batch, report: BatchReport, queue_waits_s: Sequence[float]) -> None:
        self.batches += 1
        self.items += len(batch.items)
        self.cost += batch.cost
        self.splits += report.runs > 1
        self.busy_s += report.model_s
        self._waits_s.extend(queue_waits_s)
        self._sizes.append(len(batch.items))
        self._padding.append(report.padding_share)
        now = self._clock()
        if now >= self._next_sample:
            self._next_sample = now + SAMPLE_EVERY_S
            self._sink.observe_batch(batch, report, queue_waits_s[self.batches % len(queue_waits_s)])

    def count_request(self, status: int, route: str) -> None:
        self.statuses[status] += 1
        self._unsent[status, route] += 1

    def send(self, queue_items: int, queue_cost: float, held: Held) -> None:
        """Call about once a second."""
        now = self._clock()
        then, busy_s, items, batches, failures = self._sent
        moment = Moment(
            queue_items,
            queue_cost,
            min(1.0, (self.busy_s - busy_s) / max(1e-9, (now - then) * max(1, held.instances))),
            self.items - items,
            self.batches - batches,
            self._unsent,
            held,
            held.failures - failures,
        )
        self._sent = (now, self.busy_s, self.items, self.batches, held.failures)
        self._unsent = Counter()
        self._sink.send(moment)

    def recent(self) -> dict[str, float]:
        """Quantiles over the last batches, ms and shares; zeros before the first."""
        waits_s = sorted(self._waits_s)
        return {
            "queue_wait_ms_p50": 1e3 * quantile(waits_s, 0.50),
            "queue_wait_ms_p99": 1e3 * quantile(waits_s, 0.99),
            "batch_items_mean": _mean(self._sizes),
            "padding_share_mean": _mean(self._padding),
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value at share `q` of an ascending sequence; 0 for an empty one."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _mean(values: Sequence[float] | deque[float] | deque[int]) -> float:
    return sum(values) / len(values) if values else 0.0
