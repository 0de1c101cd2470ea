"""The Runner of step-wise classes: states in rows, who fails, who is told of an end."""

import asyncio
import logging
import random
from collections import Counter
from typing import Any

import pytest
import torch

from deployments.core.contract import Streams
from deployments.core.errors import InvalidItem, ModelBroken, ModelFailed, ServingError
from deployments.engine.sequence import Advance, Sequence, Step, Work
from deployments.runtime.model_class import ModelClassError
from deployments.runtime.state_slots import MIN_ROWS, StateSlots
from deployments.runtime.stepwise import MAX_REST_BYTES, StepModel
from deployments.runtime.stepwise_class import check_stepped, is_stepwise

_RAISED: dict[str, BaseException] = {
    "ValueError": ValueError("the model's own text"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "StopIteration": StopIteration(),
    "CancelledError": asyncio.CancelledError(),
    "MemoryError": MemoryError(),
}


class Summer:
    """Adds `by` a step until `until`; raises in the method that the request names."""

    def load(self, device: str) -> None:
        self.begun, self.ended, self.sizes = 0, list[dict[str, torch.Tensor]](), list[int]()

    def key(self, request: dict[str, Any]) -> Any:
        _raise(request, "key")
        return request.get("key", "")

    def cost(self, request: dict[str, Any]) -> Any:
        _raise(request, "cost")
        return request.get("cost", 1)

    def begin(self, request: dict[str, Any]) -> Any:
        _raise(request, "begin")
        self.begun += 1
        culprit = torch.tensor(list(_RAISED).index(request["step"]) if "step" in request else -1)
        total = torch.zeros(request.get("length", 2), dtype=torch.float64)
        return {"total": total, "by": torch.tensor(request.get("by", 1.0)), "culprit": culprit,
                "until": torch.tensor(request.get("until", 3.0))}  # fmt: skip

    def step(self, states: dict[str, torch.Tensor], inputs: list[None]) -> Any:
        self.sizes.append(len(inputs))
        states["total"] += states["by"].double().unsqueeze(1)  # in place: a failed step must not keep it
        for culprit in states["culprit"].tolist():
            if culprit >= 0:
                raise list(_RAISED.values())[culprit]
        totals = states["total"][:, 0].tolist()
        done = [total >= until for total, until in zip(totals, states["until"].tolist(), strict=True)]
        return states, totals, done

    def end(self, state: dict[str, torch.Tensor]) -> None:
        self.ended.append(state)


def _raise(request: dict[str, Any], method: str) -> None:
    if method in request.get("raise", {}):
        raise _RAISED[request["raise"][method]]


class Words:
    """A stream of lines; each is answered with its number and its text."""

    many_outputs = True

    def load(self, device: str) -> None: ...

    def begin(self, request: None) -> dict[str, torch.Tensor]:
        return {"lines": torch.zeros((), dtype=torch.int64)}

    def chunk(self, data: bytes) -> tuple[list[str], bytes]:
        *lines, rest = data.split(b"\n")
        return [line.decode() for line in lines], rest

    def step(self, states: dict[str, torch.Tensor], inputs: list[str]) -> Any:
        lines = states["lines"] + 1
        outputs = [[n, text] for n, text in zip(lines.tolist(), inputs, strict=True)]
        return {"lines": lines}, outputs, [text == "bye" for text in inputs]


def loaded(model_class: type = Summer, slots: int = 64) -> StepModel:
    model = StepModel(model_class, {})
    model.load("cpu", slots)
    return model


def step(model: StepModel, *work: Sequence, ended: tuple[Sequence, ...] = ()) -> list[Advance]:
    works = [Work(s, s.computed, 1, s.remaining == 1) for s in work]
    advances = model.run(Step(works, [], [], list(ended), [], "", 0.0))
    assert len(advances) == len(work)
    for sequence, advance in zip(work, advances, strict=True):
        sequence.computed += 1
        sequence.known += advance.units
    return advances


def run(model: StepModel, sequence: Sequence) -> list[Any]:
    """To its end, alone."""
    outputs: list[Any] = []
    while sequence.remaining:
        (advance,) = step(model, sequence)
        if advance.error:
            raise advance.error
        outputs += advance.outputs
    step(model, ended=(sequence,))
    return outputs


# Sequences and their states


def test_a_sequence_steps_to_its_end_and_its_outputs_come_in_order() -> None:
    model = loaded()
    sequence = model.prepare({"by": 0.5, "until": 2.0})
    assert (sequence.known, sequence.is_open, sequence.cost, sequence.key) == (1, False, 1.0, "")
    assert run(model, sequence) == [0.5, 1.0, 1.5, 2.0]
    assert sequence.computed == sequence.known == 4
    assert model.state_bytes == 0


def test_any_subset_in_any_order_gives_what_each_gives_alone() -> None:
    model, chooser = loaded(), random.Random(0)
    requests = [{"by": 0.25 * (i + 1), "until": 5.0} for i in range(40)]
    alone = [run(loaded(), loaded().prepare(request)) for request in requests]
    live = {i: model.prepare(request) for i, request in enumerate(requests)}
    outputs: list[list[Any]] = [[] for _ in requests]
    while live:
        chosen = chooser.sample(sorted(live), chooser.randint(1, len(live)))
        ended = []
        for index, advance in zip(chosen, step(model, *(live[i] for i in chosen)), strict=True):
            outputs[index] += advance.outputs
            if advance.is_done:
                ended.append(live.pop(index))
        step(model, ended=tuple(ended))
    assert outputs == alone
    assert model.state_bytes == 0


def test_rows_are_used_again_and_memory_falls_with_the_sequences() -> None:
    slots = StateSlots("cpu", 1000)
    rows = [slots.add("", {"x": torch.full((3,), float(i))}) for i in range(1000)]
    assert slots.bytes == 1000 * 3 * 4  # capacity grew by doubling, up to slots
    stack = rows[0].stack
    order = random.Random(1).sample(range(1000), 1000)
    for count, leaving in enumerate(order):
        slots.remove(rows[leaving])
        left = order[count + 1 :][:5]
        assert [float(stack.read(rows[i])["x"][0]) for i in left] == left
        assert slots.bytes <= max(MIN_ROWS, 4 * len(slots)) * 3 * 4
    assert slots.bytes == len(slots) == 0


def test_sequences_beyond_the_slots_fail_alone() -> None:
    model = loaded(slots=2)
    first, second, third = (model.prepare({}) for _ in range(3))
    errors = [advance.error for advance in step(model, first, second, third)]
    assert errors[:2] == [None, None]
    assert isinstance(errors[2], ModelFailed)


def test_states_that_differ_under_one_key_fail_the_later_one_with_advice() -> None:
    model = loaded()
    short, long, keyed = (
        model.prepare({"length": 2}), model.prepare({"length": 3}), model.prepare({"length": 3, "key": "3"})
    )  # fmt: skip
    advances = step(model, short, long)
    assert advances[0].error is None
    assert isinstance(advances[1].error, ModelBroken)
    assert "declare key(request)" in advances[1].error.message
    assert step(model, keyed)[0].error is None
    assert step(model, short)[0].outputs == (2.0,)
    step(model, ended=(short, long))
    assert step(model, model.prepare({"length": 3}))[0].error is None  # nobody is left to differ from


def test_keys_of_equal_states_share_a_stack() -> None:
    model = loaded()
    one, other = model.prepare({"key": "a"}), model.prepare({"key": "b"})
    step(model, one)
    held = model.state_bytes
    step(model, other)
    assert model.state_bytes == held


# Ends


def test_end_is_called_once_with_the_last_state_at_every_kind_of_end() -> None:
    model = loaded()
    done, cancelled, failing, never, refused = (
        model.prepare({"until": 1.0}), model.prepare({}), model.prepare({"step": "ValueError"}),
        model.prepare({}), model.prepare({"raise": {"begin": "ValueError"}}),
    )  # fmt: skip
    step(model, done, cancelled, failing, refused)
    step(model, ended=(done, cancelled, failing, never, refused))
    step(model, ended=(done, cancelled))  # told twice: nothing more
    assert model.model.begun == len(model.model.ended) == 3
    assert [float(state["total"][0]) for state in model.model.ended] == [1.0, 1.0, 0.0]
    assert model.state_bytes == 0


def test_what_end_raises_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    class Rude(Summer):
        def end(self, state: Any) -> None:
            raise SystemExit("bye")

    model = loaded(Rude)
    one, other = model.prepare({}), model.prepare({})
    step(model, one, other)
    with caplog.at_level(logging.ERROR):
        assert step(model, other, ended=(one,))[0].error is None
    assert "Rude end raised" in caplog.text
    assert model.failed_ends == 1


# Failures


@pytest.mark.parametrize("name", list(_RAISED))
@pytest.mark.parametrize("method", ["key", "cost", "begin", "step"])
def test_whatever_is_raised_fails_one_sequence(method: str, name: str) -> None:
    model = loaded()
    mates = [model.prepare({"by": float(i)}) for i in range(1, 8)]
    request: dict[str, Any] = {"step": name} if method == "step" else {"raise": {method: name}}
    error: ServingError | None = None
    stepped = 0
    try:
        culprit = model.prepare(request)
    except ServingError as raised:
        error = raised
    else:
        advances = step(model, *mates[:3], culprit, *mates[3:])
        error, stepped = advances.pop(3).error, 1
        assert [advance.outputs for advance in advances] == [(float(i),) for i in range(1, 8)]
    is_callers = (name == "ValueError" and method != "step") or (name == "MemoryError" and method == "step")
    assert type(error) is (InvalidItem if is_callers else ModelFailed)
    assert "Traceback" not in error.message
    # A step that failed in between has spoilt no state.
    assert [a.outputs for a in step(model, *mates)] == [((stepped + 1.0) * i,) for i in range(1, 8)]


def test_culprits_are_found_by_halving() -> None:
    model = loaded()
    mates = [model.prepare({"step": "ValueError"} if i == 5 else {}) for i in range(64)]
    advances = step(model, *mates)
    assert [i for i, advance in enumerate(advances) if advance.error] == [5]
    assert len(model.model.sizes) == 2 * 6 + 1


class Odd(Summer):
    """Its step returns what the test wants."""

    wanted: Any = None

    def step(self, states: dict[str, torch.Tensor], inputs: list[None]) -> Any:
        return type(self).wanted(states, len(inputs))


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (lambda s, n: None, "step returned null, not (states, outputs, done)"),
        (lambda s, n: (s, [1] * n), "step returned a tuple, not (states, outputs, done)"),
        (lambda s, n: (s, [1] * (n + 1), [False] * n), "step returned 3 outputs for a batch of 2"),
        (lambda s, n: (s, [1] * n, [False]), "step returned 1 done for a batch of 2"),
        (lambda s, n: (s, 1, [False] * n), "step's outputs are a int, not a list"),
        (lambda s, n: (s, [1] * n, ["no"] * n), "done must be a list of booleans"),
        (lambda s, n: ([], [1] * n, [False] * n), "step's states are a list, not a dict of tensors"),
        (lambda s, n: ({"total": s["total"]}, [1] * n, [False] * n), "returned the states ['total']"),
        (lambda s, n: ({**s, "by": None}, [1] * n, [False] * n), "state 'by' is null, not a tensor"),
        (lambda s, n: ({**s, "by": s["by"][:1]}, [1] * n, [False] * n), "float32 [1], it was given"),
        (lambda s, n: ({**s, "by": s["by"].int()}, [1] * n, [False] * n), "int32 [2], it was given"),
    ],
)  # fmt: skip
def test_a_step_that_breaks_the_contract_is_told_how(wanted: Any, sentence: str) -> None:
    Odd.wanted = staticmethod(wanted)
    model = loaded(Odd)
    for advance in step(model, model.prepare({}), model.prepare({})):
        assert isinstance(advance.error, ModelBroken)
        assert sentence in advance.error.message


def test_done_may_be_a_tensor() -> None:
    states = {"x": torch.zeros(2)}
    assert check_stepped((states, [1, 2], torch.tensor([True, False])), states, 2).done == [True, False]


@pytest.mark.parametrize("output", [float("nan"), {"a": [float("inf")]}, {1: 2}, object()])
def test_an_output_that_is_no_json_fails_its_sequence_alone(output: Any) -> None:
    Odd.wanted = staticmethod(lambda s, n: (s, [1.0, output], [False] * n))
    model = loaded(Odd)
    good, bad = step(model, model.prepare({}), model.prepare({}))
    assert good.outputs == (1.0,)
    assert isinstance(bad.error, ModelBroken)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (None, "begin returned null"),
        ({"x": 1.0}, "begin's state 'x' is a float"),
        ([1], "begin returned a list"),
    ],
)
def test_a_state_that_is_no_dict_of_tensors_is_told_so(state: Any, sentence: str) -> None:
    class Stateless(Summer):
        def begin(self, request: Any) -> Any:
            return state

    (advance,) = step(model := loaded(Stateless), model.prepare({}))
    assert isinstance(advance.error, ModelBroken)
    assert sentence in advance.error.message


@pytest.mark.parametrize(
    "request_", [{"key": ["a"]}, {"cost": 0}, {"cost": "many"}, {"cost": float("nan")}], ids=str
)
def test_keys_and_costs_that_cannot_be_are_refused_at_the_door(request_: dict[str, Any]) -> None:
    with pytest.raises(ModelBroken, match="returned"):
        loaded().prepare(request_)


# Streams of bytes


def test_bytes_become_chunks_and_each_output_is_sent_on_its_own() -> None:
    model = loaded(Words)
    sequence = model.prepare(None)
    assert (sequence.known, sequence.is_open, model.takes_chunks) == (0, True, True)
    assert model.split(sequence, b"on") == 0
    assert model.split(sequence, b"e\ntwo\nth") == 2
    assert model.split(sequence, b"ree\n") == 1
    assert model.finish_input(sequence) == 0
    sequence.known = 3
    assert run(model, sequence) == [1, "one", 2, "two", 3, "three"]


def test_a_stream_begins_with_none_also_where_its_bytes_are_known() -> None:
    assert loaded(Words).prepare(b"one\n").payload.request is None


def test_a_stream_may_end_itself() -> None:
    model = loaded(Words)
    sequence = model.prepare(None)
    sequence.known += model.split(sequence, b"bye\n")
    (advance,) = step(model, sequence)
    assert (advance.is_done, advance.units) == (True, 0)


def test_a_rest_at_the_end_is_refused_without_last_chunk() -> None:
    model = loaded(Words)
    sequence = model.prepare(None)
    model.split(sequence, b"half a li")
    with pytest.raises(InvalidItem, match="ended within a chunk: 9 bytes"):
        model.finish_input(sequence)


def test_bytes_without_a_chunk_are_bounded() -> None:
    model = loaded(Words)
    sequence = model.prepare(None)
    assert model.split(sequence, b"x" * MAX_REST_BYTES) == 0
    with pytest.raises(InvalidItem, match="hold no whole chunk"):
        model.split(sequence, b"x")


def test_what_chunk_refuses_is_the_callers_and_what_it_breaks_is_ours() -> None:
    class Fussy(Words):
        def chunk(self, data: bytes) -> Any:
            return {b"v": lambda: int("x"), b"r": lambda: 1 // 0, b"n": lambda: None,
                    b"s": lambda: ([], "rest"), b"c": lambda: ("abc", b"")}[data]()  # fmt: skip

    model = loaded(Fussy)
    for data, error in ((b"v", InvalidItem), (b"r", ModelFailed), (b"n", ModelBroken), (b"s", ModelBroken),
                        (b"c", ModelBroken)):  # fmt: skip
        with pytest.raises(error):
            model.split(model.prepare(None), data)


def test_many_outputs_must_be_lists() -> None:
    class Single(Words):
        def step(self, states: Any, inputs: list[str]) -> Any:
            return states, ["text"] * len(inputs), [False] * len(inputs)

    model = loaded(Single)
    sequence = model.prepare(None)
    model.split(sequence, b"one\n")
    (advance,) = step(model, sequence)
    assert isinstance(advance.error, ModelBroken)


# Items and answers


def test_an_item_is_the_request_or_of_a_stream_its_bytes() -> None:
    assert loaded().read_item({"by": 2}) == {"by": 2}
    assert loaded(Words).read_item(b"one\n") == b"one\n"
    with pytest.raises(InvalidItem, match="expected the raw bytes"):
        loaded(Words).read_item("one")


def test_the_card_says_what_streams() -> None:
    assert loaded().card("sum").streams is Streams.REQUEST
    assert loaded(Words).card("words").streams is Streams.CHUNKS
    assert loaded(Words).card("words").name == "words"


def test_postprocess_makes_one_value_of_all_outputs() -> None:
    class Last(Summer):
        def postprocess(self, outputs: list[Any]) -> Any:
            return {"last": torch.tensor(outputs[-1])}

    assert loaded().postprocess([1.0, 2.0]) == [1.0, 2.0]
    assert loaded(Last).postprocess([1.0, 2.0]) == {"last": 2.0}
    with pytest.raises(ModelFailed, match="IndexError in postprocess"):
        loaded(Last).postprocess([])
    assert loaded().to_tensors([1.0, 2.0])["output"].tolist() == [1.0, 2.0]


def test_an_example_that_preprocess_refuses_stops_the_load() -> None:
    class Picky(Summer):
        def preprocess(self, item: Any) -> Any:
            raise ValueError("never")

        def examples(self) -> list[Any]:
            return [{}]

    with pytest.raises(ModelClassError, match=r"Picky.examples\(\)\[0\] is refused: never"):
        loaded(Picky)


# The class


class NoStep:
    def load(self, device: str) -> None: ...
    def begin(self, request: Any) -> Any: ...


class OneArgument(NoStep):
    def step(self, states: Any) -> Any: ...


class AsyncStep(NoStep):
    async def step(self, states: Any, inputs: Any) -> Any: ...


class LoneLastChunk(NoStep):
    def step(self, states: Any, inputs: Any) -> Any: ...
    def last_chunk(self, rest: bytes) -> Any: ...


@pytest.mark.parametrize(
    ("model_class", "sentence"),
    [
        (NoStep, "NoStep has no step; add `def step(self, states, inputs)`"),
        (OneArgument, "must be `def step(self, states, inputs)`"),
        (AsyncStep, "step is async"),
        (LoneLastChunk, "has last_chunk but no chunk"),
    ],
)
def test_a_class_that_cannot_be_stepped_is_refused_before_it_loads(model_class: type, sentence: str) -> None:
    with pytest.raises(ModelClassError) as found:
        StepModel(model_class, {})
    assert sentence in str(found.value)


def test_wrong_model_args_name_the_right_ones() -> None:
    class Sized(Summer):
        def __init__(self, size: int = 1) -> None: ...

    with pytest.raises(ModelClassError, match="did you mean 'size'"):
        StepModel(Sized, {"sise": 2})


def test_a_step_wise_class_is_told_from_a_batched_one() -> None:
    assert [is_stepwise(c) for c in (Summer, Words, NoStep, torch.nn.Linear)] == [True, True, True, False]


def test_several_units_of_one_sequence_are_refused() -> None:
    model = loaded()
    with pytest.raises(ValueError, match="one unit"):
        model.run(Step([Work(model.prepare({}), 0, 2, True)], [], [], [], [], "", 0.0))


def test_every_method_of_a_step_runs_without_gradients() -> None:
    modes: Counter[str] = Counter()

    class Watching(Summer):
        def begin(self, request: Any) -> Any:
            modes[f"begin {torch.is_inference_mode_enabled()}"] += 1
            return super().begin(request)

        def step(self, states: Any, inputs: Any) -> Any:
            modes[f"step {torch.is_inference_mode_enabled()}"] += 1
            return super().step(states, inputs)

    model = loaded(Watching)
    step(model, model.prepare({}))
    assert set(modes) == {"begin True", "step True"}
