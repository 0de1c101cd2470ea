"""Which variants (`optimise`) are worth a look here, and whether one may serve.

Owns: which are tried, the question to the audit. Must not know: how variants are made, compared, measured.
"""

from collections.abc import Callable
from typing import Any

from deployments.audit.target import Target
from deployments.audit.variant import verify
from scripts.tune.application import Application
from scripts.tune.points import Point

PROMISING = {"cpu": ("int8", "packed", "bf16", "fuse"), "cuda": ("bf16", "cuda_graphs", "compile")}
"""Each is a process to start; those left out here need minutes to compile, or were slower on what we ship."""
BUDGET_S = 15.0
"""Of a verification, beside loading the model twice."""
TAKES_S = 30.0


def promising(device: str, now: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Variants to try; none where the config names its own: those were chosen, and stay."""
    return [] if now else [(name,) for name in PROMISING[device.partition(":")[0]]]


def verified(app: Application, point: Point, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The audit's word on a point's variant, with the application's own max_error: "accepted", "reason"."""
    job, max_error = app.job, app.args.get("max_error")
    target = Target(job.model, job.model_args, job.folders[0], device)
    return verify(target, point.shape.variant, max_error, say, budget_s=BUDGET_S, batch_size=point.batch)
