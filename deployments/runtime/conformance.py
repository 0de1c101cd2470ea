"""One suite that every dynamic-batching model passes: ours, and a user's own.

Owns: what is checked and what each failure means. Must not know: Ray, HTTP, which model it is.
A step-wise class has its own suite with the same kind of report: step_conformance.py.
It answers: does the class keep the contract ("Your own model"), and does an item get in a crowd
what it gets alone? Whether threads may share the model is the audit's question.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deployments.core.errors import InvalidItem, ServingError
from deployments.runtime import items, tensors
from deployments.runtime.adapter import Adapter, ModelClassError
from deployments.runtime.difference import difference
from deployments.runtime.modules import modules_of

TOLERANCE = 1e-4
"""Relative to the output's largest value. fp32 kernels differ by about 1e-6 between batch sizes."""

DEEP = 10_000
HOSTILE_ITEMS: tuple[Any, ...] = (
    None, True, -1, 1e300, "", "\x00", "text", b"", [], {}, [None], [[1], [1, 2]],
    {"unknown": 1}, [[[["a"]]]], [1.5] * 10_000, "x" * 1_000_000,
)  # fmt: skip


class CheckFailed(Exception):
    """A check's verdict; the text says what was found and what to change."""


class CheckSkipped(Exception):
    """The check has nothing to look at; the text says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """One check: passed is None where it was skipped."""

    check: str
    passed: bool | None
    detail: str = ""


@dataclass(slots=True)
class Report:
    """All results of one model, in the order they were run."""

    model: str
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(result.passed is not False for result in self.results)

    def lines(self) -> Iterator[str]:
        """A readable report, one line a check."""
        words = {True: "ok  ", False: "FAIL", None: "skip"}
        for result in self.results:
            detail = f": {result.detail}" if result.detail else ""
            yield f"{words[result.passed]}  {result.check}{detail}"
        failed = sum(result.passed is False for result in self.results)
        plural = "" if failed == 1 else "s"
        yield f"{self.model}: {f'{failed} check{plural} failed' if failed else 'passed'}"


def check_model(
    model_class: type,
    model_args: Mapping[str, Any],
    *,
    device: str = "cpu",
    max_batch_size: int = 8,
) -> Report:
    """Load the model and run every check; in this thread. Raises ModelClassError if it can't be.

    A check that fails doesn't stop the others.
    """
    adapter = Adapter(model_class, model_args)
    with load_errors(adapter.name):
        adapter.load(device)
    return run_checks(adapter.name, CHECKS, _Subject(adapter, max_batch_size))


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """What `load` raises, as ModelClassError."""
    try:
        yield
    except ModelClassError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelClassError(f"{name}.load raised {type(error).__name__}: {error}") from error


S = TypeVar("S")


def run_checks(model: str, checks: Sequence[Callable[[S], str | None]], subject: S) -> Report:
    """Every check's result, in order; one that fails doesn't stop the others."""
    return Report(model, [_run(check, subject) for check in checks])


def _run(check: Callable[[S], str | None], subject: S) -> Result:
    name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    try:
        return Result(name, True, check(subject) or "")
    except CheckSkipped as reason:
        return Result(name, None, str(reason))
    except (CheckFailed, ServingError) as error:
        return Result(name, False, str(error))
    except Exception as error:
        return Result(name, False, f"raised {type(error).__name__}: {error}")


class _Subject:
    """The loaded model and its examples, preprocessed once."""

    def __init__(self, adapter: Adapter, max_batch_size: int) -> None:
        self.adapter, self.max_batch_size = adapter, max_batch_size
        self._examples: list[Any] | None = None
        self._alone: list[Any] | None = None

    @property
    def examples(self) -> list[Any]:
        if self._examples is None:
            found = self.adapter.examples()
            if not found:
                raise CheckSkipped("the class has no examples(): add a few items")
            self._examples = [self.adapter.preprocess(item) for item in found]
        return self._examples

    @property
    def alone(self) -> list[Any]:
        """The answer of each example in a batch of its own."""
        if self._alone is None:
            self._alone = [self.answers([example])[0] for example in self.examples]
        return self._alone

    def answers(self, batch: Sequence[Any]) -> list[Any]:
        return [self.adapter.postprocess(raw) for raw in self.adapter.forward_batch(batch)]

    def groups(self) -> list[list[int]]:
        """Indices of examples that may share a batch."""
        groups: dict[Any, list[int]] = {}
        for index, example in enumerate(self.examples):
            groups.setdefault(self.adapter.key(example), []).append(index)
        return list(groups.values())

    def compare(self, order: Sequence[int], what: str) -> None:
        """Run the examples of these indices as one batch, against each alone."""
        got = self.answers([self.examples[i] for i in order])
        for place, index in enumerate(order):
            error = difference(got[place], self.alone[index])
            if error > TOLERANCE:
                raise CheckFailed(
                    f"example {index} {what} differs from alone by {error:.1e} (relative), "
                    f"more than {TOLERANCE:.0e}"
                )


def examples_pass(subject: _Subject) -> str:
    """its examples() go through, alone"""
    return f"{len(subject.alone)} examples"


def outputs_are_json(subject: _Subject) -> None:
    """outputs are finite JSON values"""
    for answer in subject.alone:
        tensors.to_json(answer)


def outputs_match(subject: _Subject) -> str:
    """outputs match the declared names, datatypes and shapes"""
    if not subject.adapter.declares_outputs:
        raise CheckSkipped("the class declares no `outputs`: /predict needs none, /v2 does")
    declared = subject.adapter.outputs
    for raw in subject.adapter.forward_batch(subject.examples[:1]):
        named = subject.adapter.to_tensors(raw)
        if set(named) != {spec.name for spec in declared}:
            raise CheckFailed(f"to_tensors gave {sorted(named)}")
        for spec in declared:
            shape = items.shape_of_list(named[spec.name])
            if spec.shape != (-1,) and spec.datatype != "BYTES":
                items.check_dims(shape, spec.shape[1:], spec.name)
    return ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in declared)


def counts_are_right(subject: _Subject) -> str:
    """every batch size gives as many outputs, each as alone"""
    sizes = sorted({1, 2, 3, subject.max_batch_size})
    for group in subject.groups():
        for size in sizes:
            subject.compare([group[i % len(group)] for i in range(size)], f"in a batch of {size}")
    return f"batches of {', '.join(map(str, sizes))}"


def order_is_kept(subject: _Subject) -> None:
    """outputs keep the order of the items"""
    groups = [group for group in subject.groups() if len(group) > 1]
    if not groups:
        raise CheckSkipped("no two examples may share a batch: add examples of one shape")
    if all(difference(subject.alone[g[0]], subject.alone[g[-1]]) <= TOLERANCE for g in groups):
        raise CheckSkipped("all examples have the same answer: add different ones")
    for group in groups:
        subject.compare(group[::-1], "in a reversed batch")


def is_deterministic(subject: _Subject) -> None:
    """the same item gives the same answer again"""
    for _ in range(3):
        for index in range(len(subject.examples)):
            subject.compare([index], "run once more")


def is_in_eval_mode(subject: _Subject) -> None:
    """every module is in eval mode"""
    check_eval_mode(subject.adapter.model)


def check_eval_mode(model: Any) -> None:
    """Raise CheckFailed, naming the module, where one is in training mode."""
    for name, module in modules_of(model):
        if module.training:
            raise CheckFailed(f"{name} is in training mode: call .eval() in load")


def costs_are_sound(subject: _Subject) -> str:
    """cost() is a number above 0 that fits max_batch_cost"""
    costs = [subject.adapter.cost(example) for example in subject.examples]
    bound = subject.adapter.max_batch_cost
    if bound is not None and max(costs) > bound:
        raise CheckFailed(f"an example costs {max(costs):g}, max_batch_cost is {bound:g}")
    return f"{min(costs):g} to {max(costs):g}"


def bad_items_are_refused(subject: _Subject) -> str:
    """items that it can't take are refused by preprocess with ValueError"""
    taken = [item for item in (*HOSTILE_ITEMS, deep_list()) if _is_taken(subject, item)]
    return f"{len(HOSTILE_ITEMS) + 1 - len(taken)} refused, {len(taken)} taken"


def _is_taken(subject: _Subject, item: Any) -> bool:
    """False if refused; CheckFailed if it brings preprocess, or the model, down."""
    try:
        example = subject.adapter.preprocess(item)
    except InvalidItem:
        return False
    except ServingError as error:
        raise CheckFailed(
            f"preprocess({shorten(item)}): {error}; raise ValueError for what the model can't take"
        ) from error
    try:
        subject.adapter.cost(example)
        subject.answers([example])
    except Exception as error:
        raise CheckFailed(
            f"preprocess took {shorten(item)}, then the model failed: {error}; "
            "declare `inputs`, or raise ValueError in preprocess"
        ) from error
    return True


def shorten(item: Any) -> str:
    """The item as text, 40 characters at most."""
    try:
        text = repr(item)
    except RecursionError:
        return f"a list nested {DEEP} deep"
    return text if len(text) <= 40 else f"{text[:37]}..."


def deep_list() -> list[Any]:
    """A list nested DEEP deep."""
    nested: list[Any] = []
    for _ in range(DEEP):
        nested = [nested]
    return nested


CHECKS: tuple[Callable[[_Subject], str | None], ...] = (
    examples_pass,
    outputs_are_json,
    outputs_match,
    costs_are_sound,
    is_in_eval_mode,
    is_deterministic,
    counts_are_right,
    order_is_kept,
    bad_items_are_refused,
)
