"""How far two answers of a model are apart, whatever their structure.

Owns: the measure. Must not know: models, what is too far.
"""

import math
from collections.abc import Iterator
from typing import Any


def difference(one: Any, other: Any) -> float:
    """Largest difference of two JSON values, relative to the largest number in them (at least 1).

    Infinity where they differ in structure, a string or a boolean.
    """
    scale = max([1.0, *(abs(x) for x in _numbers(one)), *(abs(x) for x in _numbers(other))])
    return _largest_difference(one, other) / scale


def _largest_difference(one: Any, other: Any) -> float:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return max((_largest_difference(a, b) for a, b in pairs), default=0.0)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((_largest_difference(one[k], other[k]) for k in one), default=0.0)
    if _is_number(one) and _is_number(other):
        return abs(float(one) - float(other))
    return 0.0 if one == other else math.inf


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif _is_number(value):
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
