"""Ray shell: what every replica of ours asks of Ray and of its process.

Owns: granted devices and threads, where log lines go, the garbage collector's thresholds, the types of
what the builder hands to a shell. Must not know: models, HTTP.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve._private.constants import SERVE_LOGGER_NAME

from deployments.core.contract import Limits, Service

GC_AFTER_ALLOCATIONS = 50_000

AppFactory = Callable[[Service], Any]
"""Makes the ASGI app of a service; the builder hands it in, so that no shell imports HTTP."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, made how. safety: shared, pool, exclusive, processes or auto. threads: torch's."""

    model: str
    model_args: Mapping[str, Any]
    safety: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """What a `user_config` says. grace_s: how long streams may go on while draining."""

    limits: Limits
    is_draining: bool = False
    grace_s: float | None = None


ChangeLimits = Callable[[Limits, Mapping[str, Any]], Changed]
"""Checks a `user_config` against the limits from `args`; raises on a wrong key."""


def log_with_ray() -> None:
    """Our log lines go where Ray's of this replica go, with their level: on their own they would end
    on stderr, which Ray buffers line by line as INFO until the replica stops."""
    for name in ("deployments", "serve_app"):
        logger = logging.getLogger(name)
        logger.parent = logging.getLogger(SERVE_LOGGER_NAME)
        logger.setLevel(logging.INFO)


def keep_what_is_loaded() -> None:
    """What is loaded stays: the collector need not walk it again. And it need not run after every 700
    allocations: parsing a big body alone makes millions (4 of 5.4 s were the collector's)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_AFTER_ALLOCATIONS)


def granted_gpus() -> float:
    """GPUs that Ray gave this replica. Ray shows all GPUs to an actor that asked for none."""
    return float(len(ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))


def granted_gpu_share() -> float:
    """Of its GPU, the part this replica asked for; 1 for whole ones."""
    asked = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
    return asked if 0.0 < asked < 1.0 else 1.0


def granted_threads(asked: int | None) -> int | None:
    """Torch's threads: as asked, else `num_cpus` where that is whole CPUs; a fraction shares all (None)."""
    if asked is not None:
        return asked
    num_cpus = float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
    return int(num_cpus) if num_cpus >= 1.0 else None
