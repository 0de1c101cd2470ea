"""The conformance suite passes ours, and finds what is wrong with broken ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.models.efficientnet import EfficientNetLite0
from deployments.models.minilm import MiniLM
from deployments.runtime.conformance import Report, check_model, difference
from deployments.runtime.model_class import ModelClassError
from scripts.conformance import main


class Linear:
    inputs = [("x", "FP32", [-1, 4])]
    outputs = [("y", "FP32", [-1, 2])]

    def load(self, device: str) -> None:
        self.net = torch.nn.Linear(4, 2).eval().to(device)

    def forward(self, batch: torch.Tensor) -> Any:
        return self.net(batch)

    def examples(self) -> list[Any]:
        return [[1, 2, 3, 4], [0, 0, 1, 0]]


def failures(model_class: type) -> list[str]:
    report = check_model(model_class, {})
    return [result.detail for result in report.results if result.passed is False]


@pytest.mark.parametrize("model_class", [Linear, MiniLM, EfficientNetLite0])
def test_a_sound_model_passes_every_check(model_class: type) -> None:
    report: Report = check_model(model_class, {})
    assert "\n".join(report.lines()).endswith("passed")
    assert all(result.passed for result in report.results)


def test_a_model_in_training_mode_is_found() -> None:
    class Training(Linear):
        def load(self, device: str) -> None:
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.5))

    found = failures(Training)
    assert "self.net is in training mode: call .eval() in load" in found
    assert any("run once more differs" in detail for detail in found)


class Slotted:
    __slots__ = ("net", "unset")
    inputs, outputs = Linear.inputs, Linear.outputs
    load, forward, examples = Linear.load, Linear.forward, Linear.examples  # type: ignore[assignment]


def test_a_class_with_slots_is_looked_into() -> None:
    assert failures(Slotted) == []


class Holder:
    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


class OddModule(torch.nn.Module):
    """Keeps a part in a plain list, where torch's own walk does not find it."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.parts = [part]


@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (lambda module: [torch.nn.Identity().eval(), module], "self.part[1]"),
        (lambda module: {"a": (module,)}, "self.part['a'][0]"),
        (lambda module: Holder(module), "self.part.module"),
        (lambda module: OddModule(module).eval(), "self.part.parts[0]"),
        (lambda module: _in_eval(torch.nn.Sequential(module)), "self.part.0"),
    ],
    ids=["list", "dict", "object", "module", "child"],
)
def test_a_module_in_training_mode_is_found_wherever_it_is(hide: Any, name: str) -> None:
    class Hidden(Linear):
        def load(self, device: str) -> None:
            super().load(device)
            self.part = hide(torch.nn.Dropout(0.5))
            self.itself, self.numbers = self, [0.0] * 1000

    assert failures(Hidden) == [f"{name} is in training mode: call .eval() in load"]


def _in_eval(module: torch.nn.Module) -> torch.nn.Module:
    module.training = False  # the module alone, not its children
    return module


def test_load_that_raises_system_exit_is_reported() -> None:
    class Quits(Linear):
        def load(self, device: str) -> None:
            raise SystemExit("weights.bin is missing")

    with pytest.raises(ModelClassError, match=r"Quits.load raised SystemExit: weights\.bin is missing"):
        check_model(Quits, {})


def test_a_model_whose_answers_depend_on_batch_mates_is_found() -> None:
    class Centred(Linear):
        def forward(self, batch: torch.Tensor) -> Any:
            return self.net(batch - batch.mean(0))

    assert any("in a batch of 2 differs" in detail for detail in failures(Centred))


def test_a_model_that_mixes_up_the_order_is_found() -> None:
    class Mixed(Linear):
        def forward(self, batch: torch.Tensor) -> Any:
            return self.net(batch).flip(0)

    assert any("in a reversed batch differs" in detail for detail in failures(Mixed))


def test_a_wrong_output_count_is_found() -> None:
    class Short(Linear):
        def forward(self, batch: torch.Tensor) -> Any:
            return self.net(batch)[:2]

    assert "forward returned 2 outputs for a batch of 3" in failures(Short)


def test_outputs_against_their_declaration_are_found() -> None:
    class Wrong(Linear):
        outputs = [("y", "FP32", [-1, 3])]

    assert "expected shape [3] for 'y', got [2]" in failures(Wrong)


def test_a_model_that_takes_what_it_cannot_run_is_told_to_declare_its_inputs() -> None:
    class Undeclared(Linear):
        inputs = None

        def preprocess(self, item: Any) -> torch.Tensor:
            return torch.tensor(item, dtype=torch.float32)

    assert any("raise ValueError" in detail for detail in failures(Undeclared))


def test_the_command_prints_a_report_and_its_status_says_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sound.py").write_text(
        "class Echo:\n"
        "    inputs = [('x', 'FP32', [-1, 2])]\n"
        "    def load(self, device): pass\n"
        "    def forward(self, batch): return batch\n"
        "    def examples(self): return [[1, 2], [3, 4]]\n"
        "class Short(Echo):\n"
        "    def forward(self, batch): return batch[:1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["sound:Echo"]) == 0
    assert "Echo: passed" in capsys.readouterr().out
    assert main(["sound:Short"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["sound:Missing"]) == 2


def test_difference_is_relative_and_infinite_where_structures_differ() -> None:
    assert difference([1.0, 100.0], [1.0, 101.0]) == pytest.approx(1 / 101)
    assert difference({"a": [1]}, {"a": [1]}) == 0
    assert difference("a", "b") == float("inf")
    assert difference([1], [1, 2]) == float("inf")
