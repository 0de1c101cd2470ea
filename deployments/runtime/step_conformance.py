"""One suite that every step-wise model passes: ours, and a user's own.

Owns: what is checked and what each failure means. Must not know: Ray, HTTP, which model it is, the
scheduler: steps are made here, in orders that a scheduler may come to. It answers: does the class keep
the contract ("For continuous batching"), and does a sequence get in a crowd what it gets alone?
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deployments.core.errors import InvalidItem, ServingError
from deployments.engine.sequence import Sequence as EngineSequence
from deployments.engine.sequence import Step, Work
from deployments.runtime import items
from deployments.runtime.conformance import (
    HOSTILE_ITEMS,
    TOLERANCE,
    CheckFailed,
    CheckSkipped,
    Report,
    check_eval_mode,
    deep_list,
    load_errors,
    run_checks,
    shorten,
)
from deployments.runtime.difference import difference
from deployments.runtime.stepwise import StepModel

MAX_STEPS = 10_000
"""Of one example: a sequence that goes on for longer has no end."""

HOSTILE_BYTES = (b"\x00", b"\xff" * 4096, bytes(range(256)) * 40, b"[" * 10_000)


def check_step_model(
    model_class: type, model_args: Mapping[str, Any], *, device: str = "cpu", max_batch_size: int = 8
) -> Report:
    """Load the model and run every check; in this thread. Raises ModelClassError if it can't be.

    max_batch_size: sequences of a step.
    """
    model = StepModel(model_class, model_args)
    with load_errors(model.name):
        model.load(device, 4 * max_batch_size)
    return run_checks(model.name, CHECKS, Subject(model, max_batch_size))


class Member:
    """One sequence of a crowd: all its input is fed at once, or in the pieces that `cut` makes of it."""

    def __init__(self, model: StepModel, request: Any, pieces: Iterable[bytes] = ()) -> None:
        self.model, self.outputs = model, list[Any]()
        self.is_done = False
        self.sequence: EngineSequence = model.prepare(request)
        if model.takes_chunks:
            for piece in pieces or (bytes(request),):
                self.sequence.known += model.split(self.sequence, piece)
            self.sequence.known += model.finish_input(self.sequence)

    @property
    def has_work(self) -> bool:
        return not self.is_done and self.sequence.remaining > 0


def run_step(model: StepModel, members: Sequence[Member], ended: Sequence[Member] = ()) -> None:
    """One step of these. Raises the first error of any."""
    step = Step(
        work=[Work(m.sequence, m.sequence.computed, 1, m.sequence.remaining == 1) for m in members],
        saves=[], freed=[], ended=[m.sequence for m in ended], loads=[],
        key=members[0].sequence.key if members else "", planned=0.0,
    )  # fmt: skip
    for member, advance in zip(members, model.run(step), strict=True):
        if advance.error is not None:
            member.is_done = True
            raise advance.error
        member.outputs += advance.outputs
        member.sequence.computed += 1
        member.sequence.known += advance.units
        member.is_done = advance.is_done


class Subject:
    """The loaded model and its examples, each stepped alone once."""

    def __init__(self, model: StepModel, max_batch_size: int) -> None:
        self.model, self.max_batch_size = model, max_batch_size
        self._requests: list[Any] | None = None
        self._alone: list[list[Any]] | None = None

    @property
    def requests(self) -> list[Any]:
        if self._requests is None:
            found = self.model.examples()
            if not found:
                raise CheckSkipped("the class has no examples(): add a few requests")
            self._requests = [self.model.read_item(item) for item in found]
        return self._requests

    @property
    def alone(self) -> list[list[Any]]:
        """The outputs of each example, stepped alone."""
        if self._alone is None:
            self._alone = [self.outputs(request) for request in self.requests]
        return self._alone

    def outputs(self, request: Any, pieces: Iterable[bytes] = ()) -> list[Any]:
        member = Member(self.model, request, pieces)
        self.run([member], lambda ready, _: ready)
        return member.outputs

    def run(self, members: Sequence[Member], choose: Callable[[list[Member], int], Sequence[Member]]) -> None:
        """Steps until all are through; `choose` says who of those with work steps, in which order."""
        try:
            for number in range(MAX_STEPS):
                ready = [member for member in members if member.has_work]
                if not ready:
                    return
                run_step(self.model, choose(ready, number))
            raise CheckFailed(f"a sequence did not end within {MAX_STEPS} steps: return True in done")
        finally:
            run_step(self.model, [], ended=members)

    def groups(self) -> list[list[int]]:
        """Indices of examples that may share a step."""
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(self.requests):
            sequence = self.model.prepare(request)
            groups.setdefault(sequence.key, []).append(index)
        return list(groups.values())

    def compare(self, what: str, choose: Callable[[list[Member], int], Sequence[Member]]) -> None:
        """Each key's examples as a crowd of `max_batch_size`, against each alone."""
        for group in self.groups():
            order = [group[i % len(group)] for i in range(self.max_batch_size)]
            members = [Member(self.model, self.requests[index]) for index in order]
            self.run(members, choose)
            for index, member in zip(order, members, strict=True):
                self.check_same(member.outputs, index, what)

    def check_same(self, outputs: list[Any], index: int, what: str) -> None:
        error = difference(outputs, self.alone[index])
        if error > TOLERANCE:
            raise CheckFailed(
                f"example {index} {what} differs from alone by {error:.1e} (relative), "
                f"more than {TOLERANCE:.0e}: a sequence's outputs may depend on its own state and input only"
            )


def examples_pass(subject: Subject) -> str:
    """its examples() go through to their end, alone"""
    return f"{len(subject.alone)} examples, {sum(map(len, subject.alone))} outputs"


def answers_are_json(subject: Subject) -> None:
    """postprocess makes a JSON value of a whole sequence's outputs"""
    for outputs in subject.alone:
        subject.model.postprocess(outputs)


def tensors_match(subject: Subject) -> str:
    """outputs match the declared names, datatypes and shapes"""
    if getattr(subject.model.model, "outputs", None) is None:
        raise CheckSkipped("the class declares no `outputs`: /predict needs none, /v2 does")
    for outputs in subject.alone:
        named = subject.model.to_tensors(outputs)
        if set(named) != {spec.name for spec in subject.model.outputs}:
            raise CheckFailed(f"to_tensors gave {sorted(named)}")
        for spec in subject.model.outputs:
            if not subject.model.one_item and spec.shape != (-1,) and spec.datatype != "BYTES":
                items.check_dims(items.shape_of_list(named[spec.name]), spec.shape[1:], spec.name)
    return ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in subject.model.outputs)


def is_in_eval_mode(subject: Subject) -> None:
    """every module is in eval mode"""
    check_eval_mode(subject.model.model)


def is_deterministic(subject: Subject) -> None:
    """the same request begins and goes the same way again"""
    for index, request in enumerate(subject.requests):
        subject.check_same(subject.outputs(request), index, "run once more")


def crowd_is_as_alone(subject: Subject) -> str:
    """stepped in a crowd gives what alone gives"""
    subject.compare(f"in steps of {subject.max_batch_size}", lambda ready, _: ready)
    return f"steps of {subject.max_batch_size}"


def order_does_not_matter(subject: Subject) -> None:
    """rows may come in any order, another one at each step"""
    if max(map(len, subject.groups())) == 1:
        raise CheckSkipped("no two examples may share a step: add examples of one key")
    shuffler = random.Random(0)
    subject.compare("in shuffled steps", lambda ready, _: shuffler.sample(ready, len(ready)))


def any_may_sit_out(subject: Subject) -> None:
    """a sequence may join late, and sit steps out"""
    chooser = random.Random(1)

    def choose(ready: list[Member], number: int) -> list[Member]:
        joined = ready[: 1 + number // 2]
        return [m for m in joined if chooser.random() < 0.6] or joined[:1]

    subject.compare("with others joining and sitting out", choose)


def others_may_leave(subject: Subject) -> None:
    """others may leave half-way"""
    for index, request in enumerate(subject.requests):
        leaver, stayer, late = (Member(subject.model, request) for _ in range(3))
        run_step(subject.model, [m for m in (leaver, stayer) if m.has_work])
        run_step(subject.model, [], ended=[leaver])
        subject.run([late, stayer], lambda ready, _: ready)
        subject.check_same(stayer.outputs, index, "after another left")
        subject.check_same(late.outputs, index, "in the place of another that left")


def borders_do_not_matter(subject: Subject) -> str:
    """bytes may be cut at any border"""
    if not subject.model.takes_chunks:
        raise CheckSkipped("the class has no chunk")
    cutter = random.Random(2)
    for index, request in enumerate(subject.requests):
        data = bytes(request)
        for longest in (1, 3, max(3, len(data) // 7), max(3, len(data) // 2)):
            pieces, at = [], 0
            while at < len(data):
                size = cutter.randint(1, longest)
                pieces.append(data[at : at + size])
                at += size
            subject.check_same(subject.outputs(b"", pieces), index, f"cut into {len(pieces)} pieces")
    return "pieces from 1 byte to half of the stream"


def bad_items_are_refused(subject: Subject) -> str:
    """items that it can't take are refused with ValueError, and so are bytes"""
    hostile: list[Any] = [*HOSTILE_ITEMS, deep_list()]
    taken = [item for item in hostile if _is_taken(subject, item)]
    if subject.model.takes_chunks:
        for data in HOSTILE_BYTES:
            _try(subject, data, f"a stream of {len(data)} bytes that begins with {data[:4]!r}")
    return f"{len(hostile) - len(taken)} refused, {len(taken)} taken"


def _is_taken(subject: Subject, item: Any) -> bool:
    try:
        request = subject.model.read_item(item)
    except InvalidItem:
        return False
    except ServingError as error:
        raise CheckFailed(
            f"preprocess({shorten(item)}): {error}; raise ValueError for what the model can't take"
        ) from error
    return _try(subject, request, shorten(item))


def _try(subject: Subject, request: Any, shown: str) -> bool:
    """Three steps of it; CheckFailed if it is refused later than by ValueError."""
    members: list[Member] = []
    try:
        members.append(Member(subject.model, request))
        for _ in range(3):
            if members[0].has_work:
                run_step(subject.model, members)
    except InvalidItem:
        return False
    except Exception as error:
        raise CheckFailed(
            f"{shown} was taken, then the model failed: {error}; "
            "raise ValueError in preprocess, chunk or begin"
        ) from error
    finally:
        run_step(subject.model, [], ended=members)
    return True


def ends_go_through(subject: Subject) -> None:
    """end(state) raises nothing, finished or cancelled"""
    if not hasattr(subject.model.model, "end"):
        raise CheckSkipped("the class has no end")
    for request in subject.requests:
        cancelled = Member(subject.model, request)
        run_step(subject.model, [cancelled] if cancelled.has_work else [])
        run_step(subject.model, [], ended=[cancelled])
    if subject.model.failed_ends:
        raise CheckFailed(f"end raised {subject.model.failed_ends} times; the log has the tracebacks")


CHECKS: tuple[Callable[[Subject], str | None], ...] = (
    examples_pass,
    answers_are_json,
    tensors_match,
    is_in_eval_mode,
    is_deterministic,
    crowd_is_as_alone,
    order_does_not_matter,
    any_may_sit_out,
    others_may_leave,
    borders_do_not_matter,
    bad_items_are_refused,
    ends_go_through,
)
