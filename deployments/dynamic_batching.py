"""Ray shell: a model behind dynamic batching, as one Serve deployment that is its own HTTP ingress.

Owns: what Ray Serve calls (constructor, reconfigure, check_health) and the hop through
`@serve.batch`. Everything else is Ray-free: deployments/runtime/service.py and below.

`@serve.batch` is the mechanism, our batcher decides when and who (docs/decisions/0001): Ray forms a
batch as soon as its wait runs out and only then looks for a slot, so batches freeze under-filled.
Here a group enters it only when a slot is free, whole, and without a wait.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve

from deployments.core.contract import Limits
from deployments.core.submission import Result
from deployments.ray_metrics import RayMetrics
from deployments.replica import (
    AppFactory,
    ChangeLimits,
    ModelSpec,
    choose_sharing,
    granted_gpu_share,
    granted_gpus,
    granted_threads,
    keep_what_is_loaded,
    log_with_ray,
)
from deployments.runtime.adapter import Adapter, load_class
from deployments.runtime.device import choose_device
from deployments.runtime.executor import Group
from deployments.runtime.service import ModelService
from deployments.runtime.slots import Sharing


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
        log_with_ray()
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
            lambda: Adapter(load_class(spec.model), spec.model_args, spec.optimise),
            limits,
            replica=context.replica_tag,
            hop=self._hop,
            sink=RayMetrics(),
        )
        device = choose_device(granted_gpus())

        async def decide(first: Adapter) -> Sharing:
            return await choose_sharing(spec, device, first.model)

        await self._service.start(
            device, granted_threads(spec.threads), decide=decide, gpu_share=granted_gpu_share()
        )
        keep_what_is_loaded()

    def __serve_build_asgi_app__(self) -> Any:
        return self._make_app(self._service)

    async def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Limits changed in place, and the launcher's `draining`."""
        changed = self._change_limits(self._base_limits, user_config or {})
        self._service.change_limits(changed.limits)
        self._run_batch.set_max_batch_size(changed.limits.max_batch_size)
        if changed.is_draining:
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
