"""Ray shell: a model behind dynamic batching, as one Serve deployment that is its own HTTP ingress.

Owns: what Ray Serve calls (constructor, reconfigure, check_health) and the hop through
`@serve.batch`. Everything else is Ray-free: deployments/runtime/service.py and below.

`@serve.batch` is the mechanism, our batcher decides when and who (docs/decisions/0001): Ray forms a
batch as soon as its wait runs out and only then looks for a slot, so batches freeze under-filled.
Here a group enters it only when a slot is free, whole, and without a wait.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_LOGGER_NAME

from deployments.core.contract import Limits, Service
from deployments.core.submission import Result
from deployments.ray_metrics import RayMetrics
from deployments.runtime.adapter import Adapter, load_class
from deployments.runtime.device import choose_device
from deployments.runtime.executor import Group
from deployments.runtime.service import ModelService

GC_AFTER_ALLOCATIONS = 50_000

AppFactory = Callable[[Service], Any]
"""Makes the ASGI app of a service; the builder hands it in, so that no shell imports HTTP."""
ChangeLimits = Callable[[Limits, Mapping[str, Any]], tuple[Limits, bool]]
"""Checks a `user_config`: (limits with its changes, whether to drain); raises on a wrong key."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, made how. safety: shared, pool, exclusive, processes or auto (see `instances`)."""

    model: str
    model_args: Mapping[str, Any]
    safety: str = "auto"


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a group, as `@serve.batch` sees it."""

    group: Group
    index: int


@serve.ingress()
class DynamicBatching:
    """One replica: loads the model, answers HTTP, batches what comes in."""

    # Ray awaits an async constructor; type checkers know none.
    async def __init__(  # type: ignore[misc]
        self, spec: ModelSpec, limits: Limits, make_app: AppFactory, change_limits: ChangeLimits
    ) -> None:
        self._base_limits = limits
        _log_with_ray()
        # No wait, and no batch_size_fn: one that raises hangs its callers for ever (ray#66140). Twice
        # the slots: a group that Ray cut in two holds two permits.
        self._run_batch = serve.batch(
            max_batch_size=limits.max_batch_size,
            batch_wait_timeout_s=0.0,
            max_concurrent_batches=2 * limits.slots,
        )(run_entries)
        self._make_app, self._change_limits = make_app, change_limits
        context = serve.get_replica_context()
        self._service = ModelService(
            context.app_name,
            instances(spec, limits.slots),
            limits,
            replica=context.replica_tag,
            hop=self._hop,
            sink=RayMetrics(),
        )
        await self._service.start(choose_device(_granted_gpus()), _granted_threads())
        # What is loaded stays: the collector need not walk it again. And it need not run after every
        # 700 allocations: parsing a big body alone makes millions (4 of 5.4 s were the collector's).
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_AFTER_ALLOCATIONS)

    def __serve_build_asgi_app__(self) -> Any:
        return self._make_app(self._service)

    async def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Limits changed in place, and the launcher's `draining`."""
        limits, is_draining = self._change_limits(self._base_limits, user_config or {})
        self._service.change_limits(limits)
        self._run_batch.set_max_batch_size(limits.max_batch_size)
        if is_draining:
            self._service.drain()

    def check_health(self) -> None:
        self._service.check_health()

    # -- the hop --------------------------------------------------------------------------------------

    async def _hop(self, group: Group) -> None:
        """Carry a group through `@serve.batch`: all its items enter before Ray's loop wakes."""
        await asyncio.gather(*(self._run_batch(Entry(group, i)) for i in range(group.size)))


async def run_entries(entries: Sequence[Entry]) -> list[Result]:
    """The function under `@serve.batch`: one result an entry, in order; never raises.

    Two groups that Ray merged run side by side.
    """
    groups = {id(entry.group): entry.group for entry in entries}
    results = await asyncio.gather(*(group.run() for group in groups.values()))
    by_group = dict(zip(groups, results, strict=True))
    return [by_group[id(entry.group)][entry.index] for entry in entries]


def _log_with_ray() -> None:
    """Our log lines go where Ray's of this replica go, with their level: on their own they would end
    on stderr, which Ray buffers line by line as INFO until the replica stops."""
    for name in ("deployments", "serve_app"):
        logger = logging.getLogger(name)
        logger.parent = logging.getLogger(SERVE_LOGGER_NAME)
        logger.setLevel(logging.INFO)


def instances(spec: ModelSpec, slots: int) -> list[Adapter]:
    """One adapter a slot: the same one for `shared`, own ones otherwise."""
    model_class = load_class(spec.model)
    if spec.safety == "shared":
        return [Adapter(model_class, spec.model_args)] * slots
    return [Adapter(model_class, spec.model_args) for _ in range(slots)]


def _granted_gpus() -> float:
    """GPUs that Ray gave this replica. Ray shows all GPUs to an actor that asked for none."""
    return float(len(ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))


def _granted_threads() -> int | None:
    """Torch's threads: `num_cpus` where that is whole CPUs; a fraction shares them all (None)."""
    num_cpus = float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
    return int(num_cpus) if num_cpus >= 1.0 else None
