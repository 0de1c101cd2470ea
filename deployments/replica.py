"""Ray shell: what every replica of ours asks of Ray and of its process.

Owns: granted devices and threads, where log lines go, the garbage collector's thresholds, the verdict a
replica goes by, the types of what the builder hands to a shell. Must not know: HTTP, batches.
"""

import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ray
from ray.serve._private.constants import SERVE_LOGGER_NAME

from deployments.audit import deploy
from deployments.audit.decision import Asked, decide
from deployments.audit.target import Target
from deployments.core.contract import Limits, Service
from deployments.runtime.digest import digest_of
from deployments.runtime.slots import Sharing

logger = logging.getLogger(__name__)

GC_AFTER_ALLOCATIONS = 50_000

AppFactory = Callable[[Service], Any]
"""Makes the ASGI app of a service; the builder hands it in, so that no shell imports HTTP."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, made how, and how its use was asked for. threads: torch's. optimise: variants."""

    model: str
    model_args: Mapping[str, Any]
    asked: Asked = field(default_factory=Asked)
    threads: int | None = None
    optimise: tuple[str, ...] = ()
    max_error: float | None = None


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
    on stderr, which Ray buffers line by line as INFO until the replica stops. Warnings are written at once,
    and what came before them: Ray keeps a thousand lines back otherwise."""
    for handler in logging.getLogger(SERVE_LOGGER_NAME).handlers:
        if isinstance(handler, MemoryHandler):
            handler.flushLevel = logging.WARNING
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


def _folder_of(module: str) -> Path:
    """Where the top of a loaded module's package lies: what has to be on the path to import it."""
    file = Path(sys.modules[module].__file__ or ".").resolve()
    up = module.count(".") + (file.name == "__init__.py")
    return file.parents[min(up, len(file.parents) - 1)]


async def choose_sharing(spec: ModelSpec, device: str, instance: Any) -> Sharing:
    """How the loaded model may be used: by its stored verdict, or under `auto` by one made now; its variants
    are verified first.

    Raises BatchingRefused, VariantRefused.
    """
    folder = str(_folder_of(spec.model.partition(":")[0]))
    target = Target(spec.model, spec.model_args, folder, device, spec.optimise)
    weights = await asyncio.to_thread(digest_of, instance)
    variants = ""
    if spec.optimise:
        found = await asyncio.to_thread(deploy.check_variants, target, weights, spec.max_error)
        variants = str(found["reason"])
    verdict = deploy.verdict_of if spec.asked.safety == "auto" else deploy.stored_verdict
    report = await asyncio.to_thread(verdict, target, weights)
    decision = decide(spec.asked, report)
    sharing = replace(decision.sharing, variants=variants)
    logger.info(
        "event=safety model=%s mode=%s slots=%d verdict=%r reason=%r",
        spec.model,
        sharing.mode,
        sharing.slots,
        sharing.verdict,
        sharing.reason,
    )
    for warning in decision.warnings:
        logger.warning("event=safety_warning model=%s %s", spec.model, warning)
    return sharing
