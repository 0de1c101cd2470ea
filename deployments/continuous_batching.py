"""Ray shell: a model behind continuous batching, as one Serve deployment that is its own HTTP ingress.

Owns: what Ray Serve calls (constructor, reconfigure, check_health). Everything else is Ray-free:
deployments/runtime/continuous.py and the engine below it. No `@serve.batch` here: sequences join and leave
at every step, so there is no batch that Ray could form.
"""

import sys
from collections.abc import Mapping
from typing import Any

from ray import serve

from deployments.core.contract import Limits
from deployments.ray_metrics import RayEngineMetrics
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
from deployments.runtime.continuous import ContinuousService
from deployments.runtime.device import choose_device
from deployments.runtime.fronts import Place, front_of
from deployments.runtime.model_class import load_class
from deployments.runtime.slots import Sharing

SWITCH_S = 0.0005
"""The model thread asks for the interpreter's lock after each operator. While the event loop sends hundreds
of results it would wait Python's 5 ms each time: 500 audio streams p50 1.4 s, with this 50 to 70 ms."""


@serve.ingress()
class ContinuousBatching:
    """One replica: loads the model, answers HTTP, steps all its sequences together."""

    # Ray awaits an async constructor; type checkers know none.
    async def __init__(  # type: ignore[misc]
        self, spec: ModelSpec, limits: Limits, make_app: AppFactory, change_limits: ChangeLimits
    ) -> None:
        self._base_limits = limits
        log_with_ray()
        sys.setswitchinterval(SWITCH_S)
        self._make_app, self._change_limits = make_app, change_limits
        context = serve.get_replica_context()
        self._service = ContinuousService(
            context.app_name,
            front_of(load_class(spec.model), spec.model_args, spec.optimise),
            limits,
            replica=context.replica_tag,
            sink=RayEngineMetrics(),
        )
        place = Place(choose_device(granted_gpus()), granted_gpu_share())

        async def decide(instance: Any) -> Sharing:
            return await choose_sharing(spec, place.device, instance)

        await self._service.start(place, granted_threads(spec.threads), decide=decide)
        keep_what_is_loaded()

    def __serve_build_asgi_app__(self) -> Any:
        return self._make_app(self._service)

    async def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Limits changed in place, and the launcher's `draining`."""
        changed = self._change_limits(self._base_limits, user_config or {})
        self._service.change_limits(changed.limits)
        if changed.is_draining:
            self._service.drain(changed.grace_s)

    def check_health(self) -> None:
        self._service.check_health()

    async def __del__(self) -> None:
        """Ray awaits it when the replica has drained: `end` of what is still in hand is called."""
        if hasattr(self, "_service"):
            await self._service.close()
