"""A replica's figures: counted once here, shown by /stats and sent to a metrics sink.

Owns: counters and the recent past. Must not know: Prometheus or Ray (a sink does).
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from deployments.core.batcher import BatchReport
from deployments.core.scheduler import Batch

RECENT = 2048
"""Waits and batches kept for the quantiles in /stats: a few seconds at full load, 16 kB."""


class MetricsSink(Protocol):
    """Where measurements go: one call an event, cheap, never raising."""

    def observe_batch(self, batch: Batch, report: BatchReport, waits_s: Sequence[float]) -> None: ...

    def count_request(self, status: int, route: str) -> None: ...

    def set_gauges(self, queue_items: int, queue_cost: float, slot_busy_share: float) -> None: ...


class NullSink:
    """For tests and offline use."""

    def observe_batch(self, batch: Batch, report: BatchReport, waits_s: Sequence[float]) -> None:
        pass

    def count_request(self, status: int, route: str) -> None:
        pass

    def set_gauges(self, queue_items: int, queue_cost: float, slot_busy_share: float) -> None:
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
        self._last_gauges = (self.started, 0.0)

    def on_batch(self, batch: Batch, report: BatchReport, queue_waits_s: Sequence[float]) -> None:
        self.batches += 1
        self.items += len(batch.items)
        self.cost += batch.cost
        self.splits += report.runs > 1
        self.busy_s += report.model_s
        self._waits_s.extend(queue_waits_s)
        self._sizes.append(len(batch.items))
        self._padding.append(report.padding_share)
        self._sink.observe_batch(batch, report, queue_waits_s)

    def count_request(self, status: int, route: str) -> None:
        self.statuses[status] += 1
        self._sink.count_request(status, route)

    def push_gauges(self, queue_items: int, queue_cost: float, slots: int) -> None:
        """Call about once a second."""
        now = self._clock()
        then, busy_then = self._last_gauges
        share = (self.busy_s - busy_then) / max(1e-9, (now - then) * slots)
        self._last_gauges = (now, self.busy_s)
        self._sink.set_gauges(queue_items, queue_cost, min(1.0, share))

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
