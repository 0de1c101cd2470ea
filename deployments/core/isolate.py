"""One bad item fails alone: a batch that raises is split until the culprits are known.

Owns: the splitting. Must not know: torch (it is told how to recognise out of memory), threads,
queues. Everything a model can raise ends here, SystemExit, KeyboardInterrupt and CancelledError
included: a model has no say over the process that serves it.
Cost: k culprits among n items take at most 2 k log2(n) + 1 runs, and every run is smaller.
"""

import traceback
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from deployments.core.errors import InvalidItem, ModelBroken, ModelFailed, ServingError
from deployments.core.submission import Result

MAX_DETAIL_CHARS = 16_384
"""Of a traceback, for the log; a model may raise with megabytes of text."""

T = TypeVar("T")

Run = Callable[[Sequence[Any]], Sequence[Any]]
"""Runs a batch of examples: one output each, in order. Raises ModelBroken for a wrong count."""


Span = tuple[int, int]
"""Examples of a batch: the first, and the one after the last."""


@dataclass(slots=True)
class Isolated:
    """results: one an example. runs: how often the model was called.

    out_of_memory: (first, end) of each part of two examples or more that ran out of memory; fitted: of
    each part that went through, where any part ran out. too_big: examples that ran out alone.
    """

    results: list[Result] = field(default_factory=list)
    runs: int = 0
    out_of_memory: list[Span] = field(default_factory=list)
    fitted: list[Span] = field(default_factory=list)
    too_big: list[int] = field(default_factory=list)
    errors: int = 0


def run_isolated(
    run: Run,
    examples: Sequence[Any],
    *,
    is_out_of_memory: Callable[[BaseException], bool],
    on_out_of_memory: Callable[[], None] = lambda: None,
    halves: bool = True,
) -> Isolated:
    """Run `examples` as one batch; where that raises, in halves, until each has a result.

    halves: False: one by one instead, but for what ran out of memory.
    """
    report = Isolated()
    _run_part(run, examples, report, _How(is_out_of_memory, on_out_of_memory, halves))
    if not report.out_of_memory:
        report.fitted.clear()
    return report


@dataclass(frozen=True, slots=True)
class _How:
    is_out: Callable[[BaseException], bool]
    on_out: Callable[[], None]
    halves: bool


def _run_part(run: Run, examples: Sequence[Any], report: Isolated, how: _How) -> None:
    report.runs += 1
    first = len(report.results)
    span = (first, first + len(examples))
    try:
        outputs = run(examples)
        report.results.extend(Result(output=output) for output in outputs)
        report.fitted.append(span)
        return
    except BaseException as error:  # the outermost edge of the model
        failure = _Failure(error, _quietly(how.is_out, error) or False, is_last=len(examples) == 1)
    # Outside of `except`: the traceback, and the tensors it holds, are gone before the next run.
    if failure.is_out_of_memory:
        _quietly(how.on_out)
        if len(examples) > 1:
            report.out_of_memory.append(span)
        else:
            report.too_big.append(first)
    if len(examples) == 1 or failure.condemns_all:
        report.errors += len(examples)
        report.results.extend(Result(error=failure.for_caller()) for _ in examples)
        return
    count = len(examples)
    cuts = (0, count // 2, count) if how.halves or failure.is_out_of_memory else range(count + 1)
    for start, end in pairwise(cuts):
        _run_part(run, examples[start:end], report, how)


def _quietly(function: Callable[..., T], *arguments: Any) -> T | None:
    """What `function` returns; None where it raises: an exception that can't even be printed must
    not take the batch-mates along."""
    try:
        return function(*arguments)
    except Exception:
        return None


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-MAX_DETAIL_CHARS:]


class _Failure:
    """What is kept of an exception: its text, not its frames."""

    def __init__(self, error: BaseException, is_out_of_memory: bool, *, is_last: bool) -> None:
        self.is_out_of_memory = is_out_of_memory
        self._message = f"the model raised {type(error).__name__} on this item"
        # Only once: a big text would be formatted again at every level of the split.
        self._detail = _quietly(_traceback_of, error) if is_last else None
        self._known = error.with_traceback(None) if isinstance(error, ServingError) else None
        # A wrong count says nothing of any single item, and a retry alone could look right by luck.
        self.condemns_all = isinstance(error, ModelBroken)

    def for_caller(self) -> ServingError:
        if self._known is not None:
            return copy(self._known)  # one object a caller: the protocols write into it
        if self.is_out_of_memory:
            return InvalidItem("this item alone does not fit the device's memory: send a smaller item")
        return ModelFailed(f"{self._message}; the server's log has it", detail=self._detail)
