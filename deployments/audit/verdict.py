"""What the properties add up to: the mode that is safe, whether to batch, and the words for it.

Owns: those rules. Must not know: how properties are decided. Never plain "safe": an unseen branch stays
unseen.
"""

from collections.abc import Mapping
from typing import Any

from deployments.audit.findings import Property

UNSAFE, WRITES, SAFE, UNDECIDED = "unsafe", "writes, no effect found", "safe as tested", "undecided"


def verdict_of(properties: Mapping[str, Property], writes: list[dict[str, Any]]) -> str:
    """Of threads in one instance, in one of three words; UNDECIDED where that is None."""
    warm, cold = (properties[name].holds for name in ("thread_safe", "cold_start_safe"))
    if warm is False or cold is False:
        return UNSAFE
    if warm is None:
        return UNDECIDED
    return WRITES if writes else SAFE


def mode_of(properties: Mapping[str, Property]) -> str:
    """shared, pool, processes or exclusive. What could not be decided counts as no, but for first calls: they
    are made on one thread. Where they are known to race that doesn't help: an item of a new length is one."""
    if properties["order_independent"].holds is False:
        return "exclusive"
    if properties["thread_safe"].holds and properties["cold_start_safe"].holds is not False:
        return "shared"
    return "pool" if properties["copy_safe"].holds else "processes"


def batching_of(properties: Mapping[str, Property]) -> str:
    """dynamic or per_item."""
    is_invariant = properties["batch_invariant"].holds is True
    return "dynamic" if is_invariant and properties["padding_invariant"].holds is not False else "per_item"


def fails(properties: Mapping[str, Property]) -> bool:
    return any(one.holds is False for one in properties.values())
