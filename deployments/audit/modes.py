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
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.audit.findings import Property
from deployments.audit.randomness import place_of_caller
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
    named = {one["type"] for one in evidence}
    watcher = _Operators()
    with watcher:
        call()
    evidence += [one for one in watcher.found if not named & one["layers"]]
    for one in evidence:
        one.pop("layers", None)
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
        return _names_training(getattr(module, "code", ""))
    # Spectral norm of the old kind is a hook that iterates in training.
    if any(hasattr(type(hook), "compute_weight") for hook in module._forward_pre_hooks.values()):
        return True
    if type(module).__module__.startswith("torch.nn.modules."):
        return isinstance(module, nn.RReLU)  # the others look at it only to choose a kernel
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _names_training(code: Any) -> bool:
    return "training" in str(code)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Batch statistics and dropout, whoever asks for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[dict[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _arguments(func, args, kwargs or {})
        if "batch_norm" in str(func) and given.get("training") and "instance_norm" not in _torch_callers():
            self._note("normalised by the statistics of the batch it is in", BATCH_NORMS)
        elif _drops(func, given):
            self._note("dropout is on", DROPOUTS)
        return func(*args, **(kwargs or {}))

    def _note(self, what: str, layers: set[str]) -> None:
        at = place_of_caller()
        if not any((one["at"], one["what"]) == (at, what) for one in self.found):
            self.found.append({"at": at, "what": what, "layers": layers})


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
