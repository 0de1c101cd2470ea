"""The names of `optimise`: what each variant does, where it can run, which exclude each other, its error.

Owns: this table and its checks. Must not know: torch, models; runtime/optimise makes the variants and
audit/variant.py verifies them.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """meaning: one line for who chooses. part: what of the model it changes; one variant a part.

    max_error: by default, on the scale of 1 - cosine; `allowed_error` puts it on other scales.
    devices: where it can run. Variants are applied in the order of this table.
    """

    name: str
    meaning: str
    part: str
    max_error: float
    devices: tuple[str, ...] = ("cpu", "cuda")


EXACT, HALF, ROUNDED = 1e-6, 1e-3, 5e-3
"""fp32 in another order of operations; 8 or 11 bits of mantissa; 8-bit weights or activations."""

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("fuse", "BatchNorm folded into its convolution, activations into the product", "fuse", EXACT),
        Variant("bf16", "weights and activations in bfloat16", "numbers", HALF),
        Variant("fp16", "weights and activations in float16", "numbers", HALF, ("cuda",)),
        Variant("packed", "fp32 weights laid out once for oneDNN's kernels", "numbers", EXACT, ("cpu",)),
        Variant("int8", "8-bit weights and activations, a scale a row, or calibrated", "numbers", ROUNDED),
        Variant("int8_weights", "8-bit weights, a scale an output; products in fp32", "numbers", ROUNDED),
        Variant("int4_weights", "4-bit weights, a scale for each group of 32", "numbers", ROUNDED),
        Variant(
            "dynamic_int8", "torch's own: 8 bits, one scale for all of a batch", "numbers", ROUNDED, ("cpu",)
        ),
        Variant("channels_last", "images and convolutions with channels innermost", "layout", EXACT),
        Variant("torchscript", "traced and frozen by TorchScript", "capture", EXACT),
        Variant("export", "compiled ahead of time by torch.export and AOTInductor", "capture", EXACT),
        Variant("compile", "compiled by torch.compile at load", "capture", EXACT),
        Variant("cuda_graphs", "a recorded CUDA graph for each size of batch", "capture", EXACT, ("cuda",)),
    )
}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The names in the order they are applied. Raises ValueError that names `optimise` and the right one."""
    taken: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or name not in VARIANTS:
            close = difflib.get_close_matches(str(name), VARIANTS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it may be {', '.join(VARIANTS)}"
            raise ValueError(f"optimise: there is no variant {name!r}; {hint}")
        part = VARIANTS[name].part
        if part in taken:
            same = (
                f"{name!r} twice"
                if taken[part] == name
                else f"{taken[part]!r} and {name!r} exclude each other"
            )
            raise ValueError(f"optimise: {same}")
        taken[part] = name
    return tuple(name for name in VARIANTS if name in taken.values())


def allowed_error(names: Sequence[str], measure: str) -> float:
    """The default `max_error` of variants together, on the scale of a measure; no variants: fp32's own.

    relative: unit vectors of a cosine c are sqrt(2 - 2c) apart. agreement: a share of answers that differ.
    """
    error = max((VARIANTS[name].max_error for name in names), default=EXACT)
    if measure == "relative":
        return math.sqrt(2 * error)
    return max(0.01, error) if measure == "agreement" else error
