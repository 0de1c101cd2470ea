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


@dataclass(frozen=True, slots=True)
class _Read:
    """An item that was preprocessed, and its place."""

    index: int
    example: Any
    cost: float


def answer(adapter: Adapter, wholes: Sequence[Whole], max_cost: float | None) -> list[Answered]:
    """One for each, in order. Raises what forward raises; an item that can't be read fails alone.

    Items of one key run together, as many as cost `max_cost` in all, each lot preprocessed right before.
    """
    answered: dict[int, Answered] = {}
    read = _read(adapter, wholes, range(len(wholes)), max_cost, answered)
    lots = _lots(adapter, read, max_cost)
    is_all = len(lots) == 1 and not answered
    for lot in lots:
        # What preprocess noted on the instance is by now the last item's of all: once more, for this lot.
        again = [one.index for one in lot]
        fresh = lot if is_all else _read(adapter, wholes, again, max_cost, answered)
        if fresh:
            _run(adapter, wholes, fresh, answered)
    return [answered[index] for index in range(len(wholes))]


def spoils(answered: Sequence[Answered]) -> bool:
    """Whether the model raised on the way: half of its notes may be left on the instance. An item that it
    refused in so many words (422) leaves it as it is."""
    return any(one.error is not None and not isinstance(one.error, InvalidItem) for one in answered)


def _read(
    adapter: Adapter,
    wholes: Sequence[Whole],
    indexes: Sequence[int],
    max_cost: float | None,
    answered: dict[int, Answered],
) -> list[_Read]:
    found = []
    for index in indexes:
        try:
            example = adapter.preprocess(wholes[index].item)
            cost = adapter.cost(example)
            if max_cost is not None and cost > max_cost:
                raise InvalidItem(
                    f"this item costs {cost:g}, a batch holds {max_cost:g} at most (max_batch_cost): send a "
                    "smaller item"
                )
            found.append(_Read(index, example, cost))
        except ServingError as error:
            answered[index] = Answered(error=error)
    return found


def _lots(adapter: Adapter, read: Sequence[_Read], max_cost: float | None) -> list[list[_Read]]:
    by_key: dict[Hashable, list[list[_Read]]] = {}
    for one in read:
        lots = by_key.setdefault(adapter.key(one.example), [[]])
        if lots[-1] and max_cost is not None and sum(o.cost for o in lots[-1]) + one.cost > max_cost:
            lots.append([])
        lots[-1].append(one)
    return [lot for lots in by_key.values() for lot in lots]


def _run(
    adapter: Adapter, wholes: Sequence[Whole], lot: Sequence[_Read], answered: dict[int, Answered]
) -> None:
    raws = adapter.forward_batch([one.example for one in lot])
    for one, raw in zip(lot, raws, strict=True):
        answered[one.index] = _finished(adapter, wholes[one.index], one, raw)


def _finished(adapter: Adapter, whole: Whole, read: _Read, raw: Any) -> Answered:
    try:
        value = adapter.to_tensors(raw) if whole.as_tensors else adapter.postprocess(raw)
        return Answered(value, None, adapter.warning(read.example), read.cost)
    except ServingError as error:
        return Answered(error=error, cost=read.cost)
    except Exception as bug:
        return Answered(error=InternalError.of("this output could not be read", bug), cost=read.cost)
