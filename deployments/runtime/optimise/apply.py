"""Makes a loaded model faster in the ways that `optimise` names.

Owns: whose transformation a variant gets, the model's own or the generic one, and the words where neither can
be. Must not know: whether it was worth it; audit/variant.py verifies that. Source: CONTRACT.md, `optimise`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deployments.core import variants
from deployments.runtime.model_class import ModelClassError
from deployments.runtime.optimise import capture, convolutions, linears, numbers
from deployments.runtime.optimise.found import CantOptimise

Call = Callable[[], Any]
"""One forward of the loaded model on some batch of its examples."""

GENERIC: Mapping[str, Callable[[Any, Sequence[Call]], None]] = {
    "fuse": convolutions.fuse,
    "bf16": numbers.to_bf16,
    "fp16": numbers.to_fp16,
    "packed": linears.replacing(linears.PackedLinear),
    "int8": linears.replacing(linears.Int8Linear),
    "int8_weights": linears.replacing(linears.Int8Weights),
    "int4_weights": linears.replacing(linears.Int4Weights, linears.Int4Weights.fits),
    "dynamic_int8": linears.replacing(linears.DynamicInt8),
    "channels_last": convolutions.to_channels_last,
    "torchscript": capture.to_torchscript,
    "export": capture.to_export,
    "compile": capture.to_compile,
    "cuda_graphs": capture.to_cuda_graphs,
}


def apply(instance: Any, names: Sequence[str], device: str, calls: Sequence[Call] = ()) -> None:
    """Change a loaded instance in place; on the model thread, before it serves.

    calls: forwards of the instance, for what is recorded from them. Raises ModelClassError that names
    `optimise` and the variant where it can't be applied.
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
        try:
            if own is None or not own(name):
                GENERIC[name](instance, calls)
        except CantOptimise as error:
            raise ModelClassError(
                f"optimise: {name!r} can't be applied to {type(instance).__name__}: {error}"
            ) from error
