"""What `import_path` in config.yaml names: typed builders, `dynamic` and `continuous` (batching).

Owns: an application's args -> a Ray Serve application. Ray validates `args` against the annotation
of the builder, so annotations must exist at run time here.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.audit.decision import Asked
from deployments.continuous_batching import ContinuousBatching
from deployments.core.contract import Limits
from deployments.dynamic_batching import DynamicBatching
from deployments.replica import Changed, ModelSpec
from deployments.runtime.fronts import is_language_model
from deployments.runtime.model_class import check_class, load_class
from deployments.runtime.stepwise_class import check_stepwise
from serve_app.config import (
    ContinuousArgs,
    ContinuousUserConfig,
    DynamicArgs,
    ModelUserConfig,
    let_in,
    let_in_streams,
)
from serve_app.http.app import make_app

DEPLOYMENT = "model"
"""Every application's model deployment has this name (CONTRACT)."""


def dynamic(args: DynamicArgs) -> Application:
    """Dynamic batching of one model; see docs/reference/config.md for `args`."""
    check_class(load_class(args.model), args.model_args)  # here, not in the replica: seconds earlier
    limits = args.limits()
    asked = Asked(args.safety, args.slots, args.asks_for_batches, args.allow_batch_dependence)
    spec = ModelSpec(args.model, args.model_args, asked, args.threads, args.optimise, args.max_error)
    deployment = serve.deployment(
        DynamicBatching,
        name=DEPLOYMENT,
        max_ongoing_requests=let_in(limits),
        health_check_period_s=5,
    )
    return deployment.bind(spec, limits, make_app, change_limits)


def continuous(args: ContinuousArgs) -> Application:
    """Continuous batching of one model; see docs/reference/config.md for `args`."""
    model_class = load_class(args.model)
    if not is_language_model(model_class):
        check_stepwise(model_class, args.model_args)
    limits = args.limits()
    deployment = serve.deployment(
        ContinuousBatching,
        name=DEPLOYMENT,
        max_ongoing_requests=let_in_streams(limits),
        health_check_period_s=5,
    )
    shares_steps = args.max_sequences > 1
    asked = Asked("exclusive", 1, shares_steps, args.allow_batch_dependence, "max_sequences")
    spec = ModelSpec(args.model, args.model_args, asked, args.threads, args.optimise, args.max_error)
    return deployment.bind(spec, limits, make_app, change_stream_limits)


def change_limits(limits: Limits, user_config: Mapping[str, Any]) -> Changed:
    """`user_config` of a dynamic application's deployment."""
    changes = ModelUserConfig(**user_config)
    return Changed(changes.apply(limits), changes.draining, changes.drain_grace_s)


def change_stream_limits(limits: Limits, user_config: Mapping[str, Any]) -> Changed:
    """`user_config` of a continuous application's deployment."""
    changes = ContinuousUserConfig(**user_config)
    return Changed(changes.apply(limits), changes.draining, changes.drain_grace_s)
