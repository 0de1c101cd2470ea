"""Whether the model is in evaluation mode: modules left in training, statistics of the batch, dropout by
default.

Owns: that check. Must not know: processes, schedules.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from deployments.audit.findings import Property
from deployments.audit.instruments import place_of_caller, watch_operators
from deployments.runtime.modules import modules_of

BATCH_NORMS = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"}
DROPOUTS = {
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "MultiheadAttention",
}


def check(instance: Any, call: Callable[[], Any]) -> Property:
    """`eval_mode`, of the instance's modules and of what one call does."""
    modules = list(modules_of(instance))
    evidence: list[dict[str, Any]] = []
    for name, module in modules:
        if module.training and cares(module):
            evidence.append({"module": name, "type": type(module).__name__, "what": "left in training"})
        elif isinstance(module, _BatchNorm) and module.running_mean is None:
            what = "BatchNorm without running statistics: it normalises by the batch it is in"
            evidence.append({"module": name, "type": type(module).__name__, "what": what})
    evidence += _seen_in(call, {one["type"] for one in evidence})
    if not evidence:
        return Property(True, f"{len(modules)} modules, none in a mode for training", [])
    first = evidence[0]
    return Property(False, f"{first.get('module') or first.get('at')}: {first['what']}", evidence[:12])


def cares(module: nn.Module) -> bool:
    """Whether it computes something else in training than in evaluation."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return isinstance(module, _BatchNorm) or module.track_running_stats
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    if isinstance(module, torch.jit.ScriptModule):
        return "training" in str(getattr(module, "code", ""))
    # Spectral norm of the old kind is a hook that iterates in training.
    if any(hasattr(type(hook), "compute_weight") for hook in module._forward_pre_hooks.values()):
        return True
    if type(module).__module__.startswith("torch.nn.modules."):
        return isinstance(module, nn.RReLU)  # the others look at it only to choose a kernel
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _seen_in(call: Callable[[], Any], named: set[str]) -> list[dict[str, Any]]:
    """Batch statistics and dropout in one call, whoever asks for them; not those of layers named already."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def note(what: str) -> None:
        at = place_of_caller()
        found[at, what] = {"at": at, "what": what}

    def look(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _arguments(func, args, kwargs)
        if "batch_norm" in str(func) and given.get("training") and "instance_norm" not in _torch_callers():
            if not named & BATCH_NORMS:
                note("normalised by the statistics of the batch it is in")
        elif _drops(func, given) and not named & DROPOUTS:
            note("dropout is on")

    with watch_operators(look):
        call()
    return list(found.values())


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the operator's schema."""
    return dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | dict(kwargs)


def _drops(func: Any, given: Mapping[str, Any]) -> bool:
    name = str(func)
    if "dropout" in name:
        return bool(given.get("train", True)) and given.get("p", 1) != 0
    if "scaled_dot_product" in name:
        return bool(given.get("dropout_p"))
    return "bernoulli" in name and any("dropout" in caller for caller in _torch_callers())


def _torch_callers() -> set[str]:
    """Names of the functions of torch on the way here."""
    names, frame = set(), sys._getframe(2)
    for _ in range(40):
        if frame is None:
            break
        if "torch" in frame.f_code.co_filename:
            names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return names
