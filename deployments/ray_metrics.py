"""Ray shell: a replica's measurements in Ray's Prometheus endpoint.

Owns: metric names, units and buckets; docs/reference/metrics.md lists them. Ray adds the tags
application, deployment and replica, and the prefix `ray_`.
"""

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.core.batcher import BatchReport
from deployments.core.figures import Moment
from deployments.core.submission import Batch

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
POWERS = [2.0**i for i in range(11)]
COSTS = [2.0**i for i in range(0, 22, 2)]
SHARES = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


class RayMetrics:
    """The MetricsSink of a replica; make it inside the replica."""

    def __init__(self) -> None:
        self._queue_wait = Histogram(
            "brimful_queue_wait_seconds",
            description="From an item's arrival until its batch began.",
            boundaries=SECONDS,
        )
        self._model = Histogram(
            "brimful_model_seconds", description="A batch's time in the model.", boundaries=SECONDS
        )
        self._batch_items = Histogram(
            "brimful_batch_items", description="Items of a batch.", boundaries=POWERS
        )
        self._cost = Histogram(
            "brimful_batch_cost", description="A batch's cost in the model's unit.", boundaries=COSTS
        )
        self._padding = Histogram(
            "brimful_padding_share", description="Share of a batch that was padding.", boundaries=SHARES
        )
        self._requests = Counter(
            "brimful_requests_total",
            description="Finished HTTP requests by status; 499: the client left.",
            tag_keys=("status", "route"),
        )
        self._items_total = Counter("brimful_items_total", description="Items that ran.")
        self._batches_total = Counter("brimful_batches_total", description="Batches that ran.")
        self._queue_items = Gauge("brimful_queue_items", description="Items waiting now.")
        self._queue_cost = Gauge("brimful_queue_cost", description="Cost waiting now.")
        self._busy = Gauge("brimful_slot_busy_share", description="Share of slots' time in the model.")

    def observe_batch(self, batch: Batch, report: BatchReport, wait_s: float) -> None:
        self._model.observe(report.model_s)
        self._batch_items.observe(len(batch.items))
        self._cost.observe(batch.cost)
        self._padding.observe(report.padding_share)
        self._queue_wait.observe(wait_s)

    def send(self, moment: Moment) -> None:
        self._queue_items.set(moment.queue_items)
        self._queue_cost.set(moment.queue_cost)
        self._busy.set(moment.slot_busy_share)
        if moment.batches:
            self._items_total.inc(moment.items)
            self._batches_total.inc(moment.batches)
        for (status, route), count in moment.requests.items():
            self._requests.inc(count, tags={"status": str(status), "route": route})
