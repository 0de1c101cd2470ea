"""`python -m scripts.bench.redeploy PLAN GCS`: deploy a changed config to a server of ours that runs.

Owns: reaching its Ray. What Ray's `serve deploy` does, but from a driver of our own: in Ray 2.60 the
dashboard, which that command asks, looks for the GCS on the machine's address, and ours listens on loopback.
"""

import sys
from pathlib import Path

from serve_app import environment
from serve_app.plan import Plan


def main() -> None:
    """The environment is complete before Ray is imported."""
    path = Path(sys.argv[1])
    plan = Plan.read(path)
    environment.load(path)
    import ray
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from serve_app import loopback

    loopback.keep_ray_on_loopback()
    ray.init(
        address=sys.argv[2],
        namespace="serve",
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    client = _get_global_client()
    if client is None:
        raise RuntimeError("Serve doesn't run there")
    client.deploy_apps(ServeDeploySchema.model_validate(plan.deploy), _blocking=False)


if __name__ == "__main__":
    main()
