"""Makes a loaded model faster in the ways that `optimise` names.

Owns: whose transformation a variant gets, the model's own or the generic one, and the words where neither can
be. Must not know: whether it was worth it; audit/variants.py verifies that. Source: CONTRACT.md, `optimise`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deployments.core import variants
from deployments.runtime.model_class import ModelClassError
from deployments.runtime.optimise import numbers
from deployments.runtime.optimise.found import CantOptimise

Call = Callable[[], Any]
"""One forward of the loaded model on some batch of its examples."""

GENERIC: Mapping[str, Callable[[Any, Sequence[Call]], None]] = {
    "bf16": numbers.to_bf16,
    "fp16": numbers.to_fp16,
}


def apply(instance: Any, names: Sequence[str], device: str, calls: Sequence[Call] = ()) -> None:
    """Change a loaded instance in place; on the model thread, before it serves.

    calls: forwards of the instance, for what is recorded or calibrated from them. Raises ModelClassError that
    names `optimise` and the variant where it can't be applied.
    """
    try:
        ordered = variants.check(names)
    except ValueError as error:
        raise ModelClassError(str(error)) from error
    for name in ordered:
        kind = torch.device(device).type
        if kind not in variants.VARIANTS[name].devices:
            where = " or ".join(variants.VARIANTS[name].devices)
            raise ModelClassError(f"optimise: {name!r} needs {where}; this model runs on {kind}")
        own = getattr(instance, "optimise", None)
        if own is not None and own(name):
            continue
        try:
            if name not in GENERIC:
                raise CantOptimise("the model would have to bring it, as its method `optimise`")
            GENERIC[name](instance, calls)
        except CantOptimise as error:
            raise ModelClassError(
                f"optimise: {name!r} can't be applied to {type(instance).__name__}: {error}"
            ) from error
