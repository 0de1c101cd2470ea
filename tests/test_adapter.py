"""Any class becomes a model: defaults are filled in, and what the class breaks is named."""

import subprocess
import sys
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from deployments.core.errors import InternalError, InvalidItem, ModelBroken, ModelFailed
from deployments.runtime.adapter import Adapter, ModelClassError, is_out_of_memory, load_class
from deployments.runtime.device import Stager, choose_device, is_device_lost
from deployments.runtime.model_thread import ModelThread
from deployments.runtime.tensors import map_tensors


class Plain:
    """The least that a class may be."""

    def load(self, device: str) -> None:
        pass

    def forward(self, batch: Any) -> Any:
        return batch * 2


class Declared(Plain):
    inputs = [("x", "FP32", [-1, 4])]
    outputs = [("y", "FP32", [-1, 4])]


class Shown(Plain):
    def examples(self) -> list[Any]:
        return [[[1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6]]]


class Two(Plain):
    inputs = [("a", "FP32", [-1, 2]), ("b", "INT64", [-1])]
    outputs = [("sum", "FP32", [-1]), ("b", "INT64", [-1])]

    def forward(self, batch: Any) -> Any:
        return batch["a"].sum(1) + batch["b"], batch["b"]


def loaded(model_class: type, **model_args: Any) -> Adapter:
    adapter = Adapter(model_class, model_args)
    adapter.load("cpu")
    return adapter


def refusal(adapter: Adapter, item: Any) -> str:
    with pytest.raises(InvalidItem) as caught:
        adapter.preprocess(item)
    return caught.value.message


def answers(adapter: Adapter, items: list[Any]) -> list[Any]:
    examples = [adapter.preprocess(item) for item in items]
    return [adapter.postprocess(raw) for raw in adapter.forward_batch(examples)]


def test_a_class_with_load_and_forward_alone_serves_lists_and_numbers() -> None:
    adapter = loaded(Plain)
    assert answers(adapter, [[1, 2], [3, 4.5]]) == [[2.0, 4.0], [6.0, 9.0]]
    assert answers(adapter, [1, 2]) == [2.0, 4.0]
    assert adapter.cost(1) == 1.0
    assert adapter.examples() == []
    assert adapter.warning(1) is None


@pytest.mark.parametrize(
    "item",
    [None, True, "x", b"raw", {}, [True], ["a"], [None], [[1], [1, 2]], [1e39], [10**400],
     [1, True], [[1.0, 2.0], [3.0, False]]],
)  # fmt: skip
def test_what_is_no_number_is_refused(item: Any) -> None:
    assert refusal(loaded(Plain), item)


def test_deep_and_huge_lists_are_refused_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "too deep" in refusal(loaded(Plain), deep)
    assert "expected shape [4]" in refusal(loaded(Declared), [0] * 1_000_000)


def test_a_shape_against_inputs_is_refused() -> None:
    assert refusal(loaded(Declared), [1, 2, 3]) == "expected shape [4], got [3]"
    assert refusal(loaded(Declared), [[1, 2, 3, 4]]) == "expected shape [4], got [1, 4]"


def test_a_shape_against_the_examples_is_refused_and_one_that_varies_there_is_not() -> None:
    adapter = loaded(Shown)
    assert refusal(adapter, [[1, 2, 3]]) == "expected shape [any, 2], got [1, 3]"
    assert adapter.preprocess([[1, 2]] * 9).shape == (9, 2)


def test_inputs_describe_the_item_of_a_class_with_its_own_preprocess() -> None:
    class Own(Declared):
        def preprocess(self, item: Any) -> Any:
            return torch.tensor(item)

    assert refusal(loaded(Own), [1.0]) == "expected shape [4], got [1]"
    assert loaded(Own).preprocess(np.ones(4, np.float32)).dtype == torch.float32


def test_examples_that_its_own_preprocess_refuses_stop_the_load() -> None:
    class Bad(Plain):
        def examples(self) -> list[Any]:
            return [[1], "nothing"]

    with pytest.raises(ModelClassError, match=r"Bad.examples\(\)\[1\] is refused"):
        loaded(Bad)


def test_several_inputs_are_an_object_and_several_outputs_keep_their_names() -> None:
    adapter = loaded(Two)
    assert answers(adapter, [{"a": [1, 2], "b": 3}]) == [[6.0, 3]]
    assert "keys ['a', 'b']" in refusal(adapter, {"a": [1, 2]})
    assert "expected shape [2] for 'a'" in refusal(adapter, {"a": [1], "b": 3})
    assert "whole numbers" in refusal(adapter, {"a": [1, 2], "b": 3.5})
    raw = adapter.forward_batch([adapter.preprocess({"a": np.ones(2, np.float32), "b": 3})])[0]
    named = adapter.to_tensors(raw)
    assert named["sum"].dtype == np.float32
    assert named["b"] == 3


def test_examples_share_a_batch_only_with_equal_shape_dtype_and_keys() -> None:
    adapter = loaded(Plain)
    keys = [adapter.key(e) for e in (torch.ones(2), torch.ones(3), torch.ones(2).int())]
    assert len(set(keys)) == 3
    assert adapter.key({"a": torch.ones(2)}) != adapter.key({"b": torch.ones(2)})
    assert adapter.key(torch.ones(2)) == adapter.key(torch.zeros(2))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda b: b[:-1], "forward returned 3 outputs for a batch of 4"),
        (lambda b: b.sum(), "forward returned a single number for a batch of 4"),
        (lambda b: None, "forward returned null"),
        (lambda b: {"a": b, "b": b[:2]}, "forward returned 2 outputs for a batch of 4"),
        (lambda b: [1], "forward returned 1 outputs for a batch of 4"),
    ],
)
def test_a_wrong_count_is_the_models_error_and_says_so(outputs: Any, message: str) -> None:
    class Wrong(Plain):
        def forward(self, batch: Any) -> Any:
            return outputs(batch)

    with pytest.raises(ModelBroken, match=message):
        loaded(Wrong).forward_batch([torch.ones(2)] * 4)


def test_its_own_split_is_counted_too() -> None:
    class Wrong(Plain):
        def split(self, outputs: Any, n: int) -> Any:
            return []

    with pytest.raises(ModelBroken, match="split returned 0 outputs for a batch of 2"):
        loaded(Wrong).forward_batch([torch.ones(2)] * 2)


def test_nan_fails_its_own_item_alone() -> None:
    adapter = loaded(Plain)
    good, bad = adapter.forward_batch([torch.ones(2), torch.tensor([1.0, float("nan")])])
    assert adapter.postprocess(good) == [2.0, 2.0]
    for method in (adapter.postprocess, adapter.to_tensors):
        with pytest.raises(ModelBroken, match="NaN or Infinity"):
            method(bad)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], {"a": np.float32("nan")}])
def test_nan_of_its_own_postprocess_is_found(value: Any) -> None:
    class Own(Plain):
        def postprocess(self, output: Any) -> Any:
            return value

    with pytest.raises(ModelBroken, match="NaN or Infinity"):
        loaded(Own).postprocess(torch.ones(1))


def test_what_json_cannot_hold_is_the_models_error() -> None:
    class Own(Plain):
        def postprocess(self, output: Any) -> Any:
            return {"a": object()}

    with pytest.raises(ModelBroken, match="holds a object, which JSON can't"):
        loaded(Own).postprocess(torch.ones(1))


@pytest.mark.parametrize("error", [KeyError("secret"), SystemExit(), KeyboardInterrupt()])
def test_what_a_users_method_raises_fails_the_item_without_its_details(
    error: BaseException,
) -> None:
    class Own(Plain):
        def preprocess(self, item: Any) -> Any:
            raise error

    with pytest.raises(ModelFailed) as caught:
        loaded(Own).preprocess(1)
    assert caught.value.message == f"the model raised {type(error).__name__} in preprocess"


def test_a_value_error_of_its_own_preprocess_is_the_callers_fault() -> None:
    class Own(Plain):
        def preprocess(self, item: Any) -> Any:
            raise ValueError("only even numbers")

    assert refusal(loaded(Own), 1) == "only even numbers"


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_a_cost_must_be_a_number_above_zero(cost: Any) -> None:
    class Own(Plain):
        def cost(self, example: Any) -> Any:
            return cost

    with pytest.raises(ModelBroken, match="cost returned"):
        loaded(Own).cost(1)


def test_padding_share_counts_what_collate_added() -> None:
    class Padded(Plain):
        def collate(self, examples: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)

    adapter = loaded(Padded)
    examples = [torch.ones(1), torch.ones(3)]
    assert adapter.padding_share(examples, adapter.collate(examples)) == pytest.approx(1 / 3)


def test_a_staged_batch_gives_the_same_as_one_that_is_not() -> None:
    adapter = loaded(Plain)
    examples = [torch.ones(2), torch.zeros(2)]
    staged = adapter.stage(adapter.collate(examples))
    assert np.array_equal(adapter.split(adapter.forward(staged), 2), [[2, 2], [0, 0]])


def test_v2_gets_what_postprocess_made() -> None:
    class Labels(Plain):
        outputs = [("label", "BYTES", [-1])]

        def postprocess(self, output: Any) -> str:
            return "big" if output > 1 else "small"

    assert loaded(Labels).to_tensors(torch.tensor(3)) == {"label": "big"}


@pytest.mark.parametrize("value", ["big", ["big"], np.array("big"), np.array(["big"])])
def test_one_string_an_item_has_no_dimension_of_its_own_in_v2(value: Any) -> None:
    class Labels(Plain):
        outputs = [("label", "BYTES", [-1])]

    class Wide(Plain):
        outputs = [("label", "BYTES", [-1, 1])]

    assert loaded(Labels).to_tensors(value) == {"label": "big"}
    assert loaded(Wide).to_tensors(value) == {"label": ["big"]}
    assert loaded(Labels).to_tensors([b"a", b"b"]) == {"label": [b"a", b"b"]}


def class_of(**methods: Any) -> type:
    return type("Broken", (), methods)


def test_a_broken_class_is_refused_with_the_right_signature() -> None:
    def load(self: Any, device: str) -> None: ...
    def forward(self: Any, batch: Any) -> None: ...
    def no_batch(self: Any) -> None: ...
    async def later(self: Any, batch: Any) -> None: ...

    cases = [
        (class_of(load=load), "Broken has no forward; add `def forward(self, batch)`"),
        (class_of(forward=forward), "Broken has no load; add `def load(self, device)`"),
        (class_of(load=load, forward=no_batch), "must be `def forward(self, batch)`"),
        (class_of(load=load, forward=later), "Broken.forward is async"),
        (class_of(load=load, forward=3), "Broken.forward is not a method"),
        (class_of(load=load, forward=forward, inputs=[("x", "FP23", [-1])]), "mean 'FP32'"),
        (class_of(load=load, forward=forward, outputs=[("x", "FP32", [4])]), "begin with -1"),
        (torch.nn.Module, "has no load"),
    ]
    for model_class, message in cases:
        with pytest.raises(ModelClassError) as caught:
            Adapter(model_class, {})
        assert message in str(caught.value)


def test_model_args_that_the_class_does_not_take_are_refused() -> None:
    class Own(Plain):
        def __init__(self, path: str = "") -> None: ...

    with pytest.raises(ModelClassError, match="did you mean 'path'"):
        Adapter(Own, {"pth": "x"})


def test_a_class_is_found_by_its_path_or_the_message_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found_model.py").write_text("class Right:\n    pass\nx = 1\n")
    (tmp_path / "broken_model.py").write_text("1 / 0\n")
    (tmp_path / "needy_model.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_class("found_model:Right").__name__ == "Right"
    for path, message in {
        "found_model": "not of the form",
        "found_model:Rihgt": "did you mean 'Right'",
        "found_model:x": "not a class",
        "no_such_model:X": "there is no module no_such_model",
        "broken_model:X": "ZeroDivisionError",
        "needy_model:X": "imports not_installed_anywhere, which is not installed",
    }.items():
        with pytest.raises(ModelClassError) as caught:
            load_class(path)
        assert message in str(caught.value)
    sys.modules.pop("found_model", None)


def test_out_of_memory_is_told_from_other_errors() -> None:
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    for error in (cpu, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    wrapped = RuntimeError("failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)


def test_numpy_scalars_of_v2_reach_a_users_preprocess_as_numbers() -> None:
    seen: list[Any] = []

    class Own(Plain):
        def preprocess(self, item: Any) -> Any:
            seen.append(item)
            return torch.zeros(1)

    for item in (np.float32(1.5), {"a": np.int64(3)}, [np.bool_(True)], np.array("text")):
        loaded(Own).preprocess(item)
    assert seen == [1.5, {"a": 3}, [True], "text"]
    assert [type(seen[0]), type(seen[1]["a"]), type(seen[2][0])] == [float, int, bool]


@pytest.mark.parametrize(
    "item",
    [torch.ones(2), np.ones(2), b"raw", {1, 2}, float("nan"), "\ud800"],
    ids=lambda item: type(item).__name__,
)
def test_examples_that_are_no_json_stop_the_load(item: Any) -> None:
    class Bad(Plain):
        def preprocess(self, item: Any) -> Any:
            return torch.zeros(2)

        def examples(self) -> Any:
            return [[1.0, 2.0], item]

    with pytest.raises(ModelClassError, match=r"Bad.examples\(\)\[1\] must be a JSON value"):
        loaded(Bad)


def test_a_schema_that_is_no_json_stops_the_load() -> None:
    class Bad(Plain):
        output_schema = {"maximum": np.float32(1)}

    with pytest.raises(ModelClassError, match=r"Bad\.output_schema must be a JSON value"):
        loaded(Bad).card("bad")


def test_examples_are_what_json_makes_of_them_and_are_made_once() -> None:
    made: list[int] = []

    class Own(Plain):
        def examples(self) -> Any:
            made.append(1)
            return ((1, 2), (3, 4))

    adapter = loaded(Own)
    assert adapter.examples() == [[1, 2], [3, 4]]
    assert adapter.card("own").examples == ([1, 2], [3, 4])
    assert made == [1]


@pytest.mark.parametrize("shape", [[-1], [-1, -1], [-1, 2, 3], [-1, 0]])
def test_an_embedding_without_a_fixed_length_stops_the_load(shape: list[int]) -> None:
    class Bad(Plain):
        embeds = True
        outputs = [("vector", "FP32", shape)]

    with pytest.raises(ModelClassError, match=r'outputs = \[\("vector", "FP32", \[-1, 384\]\)\]'):
        loaded(Bad)


def test_an_embedding_may_learn_its_length_at_load() -> None:
    class Own(Plain):
        embeds = True

        def load(self, device: str) -> None:
            self.outputs = [("vector", "FP32", [-1, 8])]

    assert loaded(Own).card("own").embeds


@pytest.mark.parametrize("cost", [np.prod((3, 4)), np.float32(12), Fraction(12), 12])
def test_a_cost_may_be_any_real_number(cost: Any) -> None:
    class Own(Plain):
        def cost(self, example: Any) -> Any:
            return cost

    Own.max_batch_cost = cost * 2  # type: ignore[attr-defined]

    assert loaded(Own).cost(1) == 12.0
    assert type(loaded(Own).cost(1)) is float
    assert loaded(Own).max_batch_cost == 24


def test_what_only_an_instance_knows_is_read_after_load() -> None:
    class Own(Plain):
        @property
        def max_batch_cost(self) -> int:
            return 7

        @cached_property
        def outputs(self) -> Any:
            return [("y", "FP32", [-1, 2])]

    assert Adapter(Own, {}).max_batch_cost is None
    adapter = loaded(Own)
    assert adapter.max_batch_cost == 7
    assert adapter.outputs[0].shape == (-1, 2)


def test_a_huge_error_is_cut_in_the_log_and_keeps_its_end() -> None:
    try:
        raise ValueError("x" * 5_000_000 + " the end")
    except ValueError as error:
        detail = InternalError.of("failed", error).detail
    assert detail is not None
    assert len(detail) <= 16_384
    assert detail.endswith(" the end\n")
    assert "characters left out" in detail


async def test_what_system_exit_said_in_load_is_kept() -> None:
    def load() -> None:
        raise SystemExit("weights.bin is missing")

    thread = ModelThread("test")
    try:
        with pytest.raises(RuntimeError, match=r"SystemExit: weights\.bin is missing"):
            await thread.call(load)
    finally:
        thread.close()


class Unprintable(RuntimeError):
    def __str__(self) -> str:
        raise ZeroDivisionError


def test_an_error_that_cannot_be_printed_is_neither_out_of_memory_nor_a_lost_device() -> None:
    assert not is_out_of_memory(Unprintable())
    assert not is_device_lost(Unprintable())
    error = Unprintable()
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    ],
)
def test_a_lost_device_is_told_from_other_errors(text: str) -> None:
    assert is_device_lost(RuntimeError(text))
    assert is_device_lost(torch.AcceleratorError(text))
    wrapped = KeyError("failed")
    wrapped.__context__ = RuntimeError(text)
    assert is_device_lost(wrapped)
    assert not is_device_lost(ValueError(text))
    assert not is_device_lost(RuntimeError(f"can't read the item {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: invalid configuration argument",
        "CUDA error: invalid argument",
        "CUDA error: no kernel image is available for execution on the device",
        "mat1 and mat2 shapes cannot be multiplied",
    ],
)
def test_an_error_that_the_device_survives_is_no_lost_device(text: str) -> None:
    assert not is_device_lost(RuntimeError(text))
    if text.startswith("CUDA"):
        assert not is_device_lost(torch.AcceleratorError(text))
    assert is_out_of_memory(RuntimeError(text)) is ("memory" in text or "ALLOC" in text)


def test_a_replica_without_gpus_computes_on_the_cpu() -> None:
    assert choose_device(0) == "cpu"


@pytest.mark.gpu
def test_a_fraction_of_a_gpu_is_a_gpu() -> None:
    assert choose_device(0.5) == choose_device(1) == "cuda"
    assert choose_device(0) == "cpu"


@pytest.mark.gpu
def test_a_staged_batch_arrives_on_the_gpu_as_it_was() -> None:
    stager = Stager("cuda")
    batch = {"x": torch.arange(1_000_000.0), "n": [torch.ones(3).pin_memory()], "name": "kept"}
    staged = stager.copy(batch)
    staged.wait()
    there = staged.ready()
    assert there["name"] == "kept"
    assert there["x"].is_cuda
    assert torch.equal(there["x"].cpu(), batch["x"])
    assert torch.equal(there["n"][0].cpu(), torch.ones(3))


@pytest.mark.gpu
def test_memory_of_a_staged_batch_is_not_reused_while_the_model_reads_it() -> None:
    stager = Stager("cuda")
    for value in range(50):
        there = stager.copy(torch.full((1_000_000,), float(value))).ready()
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        total = there.sum()
        del there  # without record_stream the next copy could take its place before the sum
        stager.copy(torch.full((1_000_000,), -1.0))
        assert total.item() == value * 1e6


@pytest.mark.gpu
def test_a_device_side_assert_is_a_lost_device() -> None:
    # In a process of its own: the context is unusable afterwards.
    program = (
        "import torch\n"
        "from deployments.runtime.device import is_device_lost, is_out_of_memory\n"
        "try:\n"
        "    torch.zeros(2, device='cuda')[torch.tensor([5], device='cuda')].cpu()\n"
        "except RuntimeError as error:\n"
        "    print(is_device_lost(error), is_out_of_memory(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"]


class Scored(NamedTuple):
    label: torch.Tensor
    score: torch.Tensor


def test_named_tuple_keeps_its_names_on_its_way_from_the_device() -> None:
    found = map_tensors(Scored(torch.ones(2), torch.zeros(2)), lambda tensor: tensor + 1)
    assert isinstance(found, Scored)
    assert found.score.tolist() == [1.0, 1.0]
