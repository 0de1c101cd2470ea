"""What `import_path` in config.yaml names: typed builders, `dynamic` for dynamic batching.

Owns: an application's args -> a Ray Serve application. Ray validates `args` against the annotation
of the builder, so annotations must exist at run time here.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.core.contract import Limits
from deployments.dynamic_batching import DynamicBatching, ModelSpec
from deployments.runtime.model_class import check_class, load_class
from serve_app.config import DynamicArgs, ModelUserConfig, let_in
from serve_app.http.app import make_app

DEPLOYMENT = "model"
"""Every application's model deployment has this name (CONTRACT)."""


def dynamic(args: DynamicArgs) -> Application:
    """Dynamic batching of one model; see docs/reference/config.md for `args`."""
    check_class(load_class(args.model), args.model_args)  # here, not in the replica: seconds earlier
    limits = args.limits()
    spec = ModelSpec(args.model, args.model_args, args.safety)
    deployment = serve.deployment(
        DynamicBatching,
        name=DEPLOYMENT,
        max_ongoing_requests=let_in(limits),
        health_check_period_s=5,
    )
    return deployment.bind(spec, limits, make_app, change_limits)


def change_limits(limits: Limits, user_config: Mapping[str, Any]) -> tuple[Limits, bool]:
    """`user_config` of a model deployment: (limits with its changes, whether to drain)."""
    changes = ModelUserConfig(**user_config)
    return changes.apply(limits), changes.draining
