"""The processes that are measured: one a shape, all loaded, one at work.

Owns: which are alive, memory's bound on how many, several at once as replicas. Must not know: what is
searched for. An idle one waits in a read and takes no CPU, so looks at two shapes can take turns.
"""

from collections.abc import Sequence
from dataclasses import replace

from deployments.core.machine import free_bytes
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape, Started
from scripts.tune.process import START_S, Worker

SPARE = 1.5
"""Of what a process takes, so much must be free before another is started: batches need memory, too."""


class Crew:
    """Start with `open`, end with `close`. Not thread-safe. start_s: what a process may take to start."""

    def __init__(self, job: Job, start_s: float = START_S) -> None:
        self._job, self._start_s = job, start_s
        self._workers: dict[Shape, list[Worker]] = {}
        self.failed: dict[Shape, str] = {}
        self._first: Started | None = None

    def open(self, shapes: Sequence[Shape], batch: int) -> None:
        """Start what is missing for these shapes, all at once; who can't start is in `failed`.

        Raises CouldNotRun where the very first can't.
        """
        begun: list[tuple[Shape, Worker]] = []
        for shape in shapes:
            one = replace(shape, replicas=1)
            missing = shape.replicas - len(self._workers.get(one, ()))
            missing -= sum(begun_shape == one for begun_shape, _ in begun)
            for _ in range(max(0, missing)):
                if not self._has_memory(1 + len(begun)):
                    self.failed[shape] = "no memory for another process beside those that run"
                    break
                begun.append((one, Worker(self._job, one, batch)))
                self._workers.setdefault(one, [])
        for number, (shape, worker) in enumerate(begun):
            try:
                started = worker.ready(self._start_s)
            except CouldNotRun as error:
                worker.close()
                if self._first is None:
                    for _, other in begun[number + 1 :]:
                        other.close()
                    raise
                self.failed[shape] = str(error)
            except BaseException:  # Ctrl-C: what was started is nobody's yet
                for _, other in begun[number:]:
                    other.close()
                raise
            else:
                self._first = self._first or started
                self._workers[shape].append(worker)

    @property
    def started(self) -> Started:
        """What the first of them said of the application."""
        assert self._first is not None, "open() first"
        return self._first

    def is_open(self, shape: Shape) -> bool:
        return len(self._workers.get(replace(shape, replicas=1), ())) >= shape.replicas

    def keep(self, shapes: Sequence[Shape]) -> None:
        """End all processes that these shapes don't need."""
        needed = {replace(shape, replicas=1) for shape in shapes}
        for shape in [shape for shape in self._workers if shape not in needed]:
            for worker in self._workers.pop(shape):
                worker.close()

    def close(self) -> None:
        self.keep([])

    def look(self, point: Point, seconds: float) -> Look:
        """Saturated for `seconds`; of several replicas, the sum. Raises CouldNotRun."""
        return self._together(point, seconds, "look", seconds)

    def offer(self, point: Point, rate: float, seconds: float, late_ms: float) -> Look:
        """Poisson arrivals at `rate` a second over all replicas; the slowest one's p99."""
        each = rate / point.shape.replicas
        return self._together(point, seconds, "offer", each, seconds, late_ms)

    def _together(self, point: Point, seconds: float, method: str, *arguments: float) -> Look:
        if not self.is_open(point.shape):
            raise CouldNotRun(f"there is no process of {point.shape.text()} any more")
        workers = self._workers[replace(point.shape, replicas=1)][: point.shape.replicas]
        for worker in workers:
            worker.ask(method, point, *arguments)
        try:
            looks = [worker.answer(seconds) for worker in workers]
        except CouldNotRun:  # it hangs, or is gone: it can't be asked again
            for worker in self._workers.pop(replace(point.shape, replicas=1)):
                worker.close()
            raise
        return Look(
            rate=sum(look.rate for look in looks),
            size=sum(look.size for look in looks) / len(looks),
            p99_ms=max(look.p99_ms for look in looks),
            late_share=max(look.late_share for look in looks),
            ran_out=any(look.ran_out for look in looks),
            busy=sum(look.busy for look in looks),
        )

    def _has_memory(self, more: int) -> bool:
        if self._first is None:
            return True
        return free_bytes() > SPARE * more * self._first.rss_bytes
