"""An item's whole way in one go on the model thread: preprocess, forward, postprocess, nothing in between.

Owns: that way, for models that may note on themselves in one part what they read in another. Must not know:
threads, queues. The server's usual way prepares later items while a batch runs; the audit calls a model as it
is done here, so what it found holds here, too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.core.errors import InternalError, InvalidItem, ServingError
from deployments.runtime.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Whole:
    """An item as it came."""

    item: Any
    as_tensors: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of it: `value` for the caller, or `error`; what `warning` says; its cost."""

    value: Any = None
    error: ServingError | None = None
    warning: tuple[str, str] | None = None
    cost: float = 1.0


def answer(adapter: Adapter, wholes: Sequence[Whole], max_cost: float | None) -> list[Answered]:
    """One for each, in order. Raises what forward raises; an item that can't be read fails alone.

    Items of one key run together, as many as cost `max_cost` in all.
    """
    answered: list[Answered | None] = [None] * len(wholes)
    groups: dict[Hashable, list[tuple[int, Any, float]]] = {}
    for index, whole in enumerate(wholes):
        try:
            example = adapter.preprocess(whole.item)
            cost = adapter.cost(example)
            if max_cost is not None and cost > max_cost:
                raise InvalidItem(
                    f"this item costs {cost:g}, a batch holds {max_cost:g} at most (max_batch_cost): send a "
                    "smaller item"
                )
            groups.setdefault(adapter.key(example), []).append((index, example, cost))
        except ServingError as error:
            answered[index] = Answered(error=error)
    for group in groups.values():
        for part in _parts(group, max_cost):
            raws = adapter.forward_batch([example for _, example, _ in part])
            for (index, example, cost), raw in zip(part, raws, strict=True):
                answered[index] = _finished(adapter, wholes[index], example, raw, cost)
    return [one if one is not None else Answered() for one in answered]


def _finished(adapter: Adapter, whole: Whole, example: Any, raw: Any, cost: float) -> Answered:
    try:
        value = adapter.to_tensors(raw) if whole.as_tensors else adapter.postprocess(raw)
        return Answered(value, None, adapter.warning(example), cost)
    except ServingError as error:
        return Answered(error=error, cost=cost)
    except Exception as bug:
        return Answered(error=InternalError.of("this output could not be read", bug), cost=cost)


def _parts(
    group: Sequence[tuple[int, Any, float]], max_cost: float | None
) -> list[list[tuple[int, Any, float]]]:
    parts: list[list[tuple[int, Any, float]]] = [[]]
    total = 0.0
    for entry in group:
        if parts[-1] and max_cost is not None and total + entry[2] > max_cost:
            parts.append([])
            total = 0.0
        parts[-1].append(entry)
        total += entry[2]
    return parts
