"""Ray shell: a replica's measurements in Ray's Prometheus endpoint.

Owns: metric names, units and buckets; docs/reference/metrics.md lists them. Ray adds the tags
application, deployment and replica, and the prefix `ray_`.
"""

from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.core.batcher import BatchReport
from deployments.core.figures import Moment
from deployments.core.submission import Batch
from deployments.engine.figures import EngineMoment, StepTotals
from deployments.engine.sequence import Step

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
        self._requests = _requests_counter()
        self._items_total = Counter("brimful_items_total", description="Items that ran.")
        self._batches_total = Counter("brimful_batches_total", description="Batches that ran.")
        self._queue_items = Gauge("brimful_queue_items", description="Items waiting now.")
        self._queue_cost = Gauge("brimful_queue_cost", description="Cost waiting now.")
        self._busy = Gauge("brimful_slot_busy_share", description="Share of slots' time in the model.")
        self._instances = Gauge("brimful_instances", description="Slots that can take a batch now.")
        self._memory = Gauge("brimful_memory_bytes", description="Resident, or held by torch on a GPU.")
        self._max_cost = Gauge("brimful_max_batch_cost", description="What a batch may cost now.")
        self._out_of_memory = Counter(
            "brimful_out_of_memory_total", description="Batches that ran out of memory or over the budget."
        )

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
        self._instances.set(moment.held.instances)
        self._memory.set(moment.held.memory_bytes)
        if moment.held.max_batch_cost is not None:
            self._max_cost.set(moment.held.max_batch_cost)
        if moment.out_of_memory:
            self._out_of_memory.inc(moment.out_of_memory)
        if moment.batches:
            self._items_total.inc(moment.items)
            self._batches_total.inc(moment.batches)
        _count(self._requests, moment.requests)


class RayEngineMetrics:
    """The EngineSink of a continuous replica; make it inside the replica."""

    def __init__(self) -> None:
        self._first = Histogram(
            "brimful_ttft_seconds",
            description="From a sequence's arrival to its first output.",
            boundaries=SECONDS,
        )
        self._gap = Histogram(
            "brimful_inter_token_seconds",
            description="Between two outputs of one sequence.",
            boundaries=SECONDS,
        )
        self._step = Histogram(
            "brimful_step_seconds",
            description="A step's time by part: schedule, run, sample, send.",
            boundaries=SECONDS,
            tag_keys=("part",),
        )
        self._units = Histogram(
            "brimful_step_units", description="Tokens (chunks, steps) of one step.", boundaries=POWERS
        )
        self._sequences = Histogram(
            "brimful_step_sequences", description="Sequences that shared a step.", boundaries=POWERS
        )
        self._requests = _requests_counter()
        self._steps_total = Counter("brimful_steps_total", description="Steps that ran.")
        self._units_total = Counter("brimful_units_total", description="Tokens (chunks, steps) that ran.")
        self._preemptions = Counter(
            "brimful_preemptions_total", description="Sequences that gave way for lack of KV memory."
        )
        self._running = Gauge("brimful_sequences_running", description="Sequences with a slot now.")
        self._waiting = Gauge("brimful_sequences_waiting", description="Sequences without a slot now.")
        self._streams = Gauge("brimful_streams_open", description="Streams whose reader is there now.")
        self._kv = Gauge("brimful_kv_used_share", description="Share of KV blocks held by sequences.")
        self._cached = Gauge(
            "brimful_prefix_cached_share", description="Share of prompt tokens taken from the prefix cache."
        )

    def observe_step(self, step: Step, seconds: StepTotals) -> None:
        self._units.observe(step.units)
        self._sequences.observe(len(step.work))
        for part in ("schedule", "run", "sample", "send"):
            self._step.observe(getattr(seconds, part), tags={"part": part})

    def observe_first(self, seconds: float) -> None:
        self._first.observe(seconds)

    def observe_gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def send(self, moment: EngineMoment) -> None:
        self._running.set(moment.running)
        self._waiting.set(moment.waiting)
        self._streams.set(moment.streams)
        self._kv.set(moment.kv_used_share)
        self._cached.set(moment.cached_share)
        if moment.steps:
            self._steps_total.inc(moment.steps)
            self._units_total.inc(moment.units)
        if moment.preemptions:
            self._preemptions.inc(moment.preemptions)
        _count(self._requests, moment.requests)


def _requests_counter() -> Counter:
    return Counter(
        "brimful_requests_total",
        description="Finished HTTP requests by status; 499: the client left.",
        tag_keys=("status", "route"),
    )


def _count(counter: Counter, requests: Mapping[tuple[int, str], int]) -> None:
    for (status, route), count in requests.items():
        counter.inc(count, tags={"status": str(status), "route": route})
