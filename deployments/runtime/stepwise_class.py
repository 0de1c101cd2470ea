"""Checks a step-wise model class by its signatures, and what its methods return.

Owns: what such a class must look like (the contract's "For continuous batching") and the sentences that
say so. Must not know: sequences, rows, threads, Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deployments.core.errors import ModelBroken
from deployments.runtime.items import name_of
from deployments.runtime.model_class import ModelClassError, check_use, require_method

SIGNATURES = {
    "load": ("device",),
    "begin": ("request",),
    "step": ("states", "inputs"),
    "chunk": ("data",),
    "last_chunk": ("rest",),
    "key": ("request",),
    "cost": ("request",),
    "end": ("state",),
    "preprocess": ("item",),
    "postprocess": ("outputs",),
    "to_tensors": ("outputs",),
    "examples": (),
}
"""Every method that we call, with its arguments; all but the first three are optional."""

REQUIRED = ("load", "begin", "step")

SHAPE_OF_A_CLASS = """a step-wise model class looks like this:

    class Follower:
        def load(self, device): ...           # once an instance: build the network, .eval().to(device)
        def begin(self, request): ...         # JSON value -> state: dict of tensors, no batch dimension
        def step(self, states, inputs): ...   # the dict stacked [B, ...] -> (states, outputs, done)
"""


def is_stepwise(model_class: Any) -> bool:
    """True where the class steps its sequences: it has begin or step, and no forward."""
    has_parts = hasattr(model_class, "begin") or hasattr(model_class, "step")
    return has_parts and not hasattr(model_class, "forward")


def check_stepwise(model_class: type, model_args: Mapping[str, Any]) -> None:
    """Raise ModelClassError unless the class can be made with `model_args` and stepped by us."""
    if not isinstance(model_class, type):
        raise ModelClassError(f"{model_class!r} is not a class; {SHAPE_OF_A_CLASS}")
    for method in REQUIRED:
        require_method(model_class, method, SIGNATURES[method], SHAPE_OF_A_CLASS)
    check_use(model_class, model_args, SIGNATURES)
    if hasattr(model_class, "last_chunk") and not hasattr(model_class, "chunk"):
        raise ModelClassError(
            f"{model_class.__name__} has last_chunk but no chunk; add `def chunk(self, data)`"
        )


def check_state(state: Any) -> dict[str, torch.Tensor]:
    """What begin returned, as a dict. Raises ModelBroken unless names lead to tensors."""
    if not isinstance(state, Mapping):
        raise ModelBroken(f"begin returned {name_of(state)}, not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelBroken(f"begin's state {name!r:.40} is {name_of(tensor)}, not a tensor")
    return dict(state)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step returned, checked: one entry a sequence, in order."""

    states: Mapping[str, torch.Tensor]
    outputs: Sequence[Any]
    done: Sequence[Any]


def check_stepped(result: Any, states: Mapping[str, torch.Tensor], count: int) -> Stepped:
    """Raise ModelBroken unless `result` is what step must return for `count` of these states."""
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        raise ModelBroken(f"step returned {name_of(result)}, not (states, outputs, done)")
    given, outputs, done = result
    _check_states(given, states)
    done = done.tolist() if isinstance(done, (torch.Tensor, np.ndarray)) else done
    for what, values in (("outputs", outputs), ("done", done)):
        if not isinstance(values, (list, tuple)):
            raise ModelBroken(f"step's {what} are {name_of(values)}, not a list")
        if len(values) != count:
            raise ModelBroken(f"step returned {len(values)} {what} for a batch of {count}")
    if not all(map(_is_bool, done)):
        raise ModelBroken("step's done must be a list of booleans, one for each sequence")
    return Stepped(given, outputs, done)


def _is_bool(value: Any) -> bool:
    return value is True or value is False or isinstance(value, np.bool_)


def _check_states(given: Any, states: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(given, Mapping):
        raise ModelBroken(f"step's states are {name_of(given)}, not a dict of tensors")
    if given.keys() != states.keys():
        raise ModelBroken(f"step returned the states {sorted(map(str, given))}, begin gave {sorted(states)}")
    for name, before in states.items():
        after = given[name]
        if not isinstance(after, torch.Tensor):
            raise ModelBroken(f"step's state {name!r} is {name_of(after)}, not a tensor")
        if after.shape != before.shape or after.dtype != before.dtype:
            raise ModelBroken(
                f"step returned the state {name!r} as {_show(after)}, it was given {_show(before)}: "
                "shapes and dtypes may not change"
            )


def _show(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
