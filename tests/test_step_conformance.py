"""The step-wise suite passes ours, and finds what is wrong with broken classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.models.denoiser import Denoiser
from deployments.models.silero_vad import SileroVad
from deployments.runtime import step_conformance
from deployments.runtime.model_class import ModelClassError
from deployments.runtime.step_conformance import check_step_model
from scripts.conformance import main


class Follower:
    """A recurrent cell that follows its request for three steps."""

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        self.cell = torch.nn.GRUCell(1, 4).eval().to(device)

    def preprocess(self, item: Any) -> float:
        if not isinstance(item, (int, float)) or isinstance(item, bool) or abs(item) > 1e6:
            raise ValueError("expected a number")
        return float(item)

    def begin(self, request: float) -> Any:
        return {"x": torch.tensor([request]), "h": torch.zeros(4), "left": torch.tensor(3)}

    def step(self, states: Any, inputs: list[None]) -> Any:
        hidden, left = self.cell(states["x"], states["h"]), states["left"] - 1
        return {**states, "h": hidden, "left": left}, hidden.tolist(), (left == 0).tolist()

    def examples(self) -> list[Any]:
        return [0.5, -1, 2]


class Pairs:
    """Sums pairs of bytes along the stream."""

    def load(self, device: str) -> None: ...

    def begin(self, request: None) -> Any:
        return {"sum": torch.zeros((), dtype=torch.int64)}

    def chunk(self, data: bytes) -> Any:
        whole = len(data) // 2 * 2
        return [data[i : i + 2] for i in range(0, whole, 2)], data[whole:]

    def last_chunk(self, rest: bytes) -> list[bytes]:
        return [rest] if rest else []

    def step(self, states: Any, inputs: list[bytes]) -> Any:
        total = states["sum"] + torch.tensor([sum(chunk) for chunk in inputs])
        return {"sum": total}, total.tolist(), [False] * len(inputs)

    def preprocess(self, item: Any) -> bytes:
        if not isinstance(item, str):
            raise ValueError("expected a string")
        return item.encode()

    def examples(self) -> list[str]:
        return ["continuous", "batching works"]


def failures(model_class: type) -> dict[str, str]:
    report = check_step_model(model_class, {})
    return {result.check: result.detail for result in report.results if result.passed is False}


@pytest.mark.parametrize("model_class", [Follower, Pairs, SileroVad, Denoiser])
def test_a_sound_model_passes_every_check(model_class: type) -> None:
    report = check_step_model(model_class, {})
    assert list(report.lines())[-1] == f"{model_class.__name__}: passed"


def test_a_model_whose_outputs_depend_on_its_mates_is_found() -> None:
    class Centred(Follower):
        def step(self, states: Any, inputs: Any) -> Any:
            return super().step({**states, "h": states["h"] - states["h"].mean(0)}, inputs)

    assert "stepped in a crowd gives what alone gives" in failures(Centred)


def test_a_model_that_mixes_up_its_rows_is_found() -> None:
    class Mixed(Follower):
        def step(self, states: Any, inputs: Any) -> Any:
            states, outputs, done = super().step(states, inputs)
            return states, outputs[::-1], done

    assert "rows may come in any order, another one at each step" in failures(Mixed)


def test_a_model_that_counts_on_the_same_mates_at_every_step_is_found() -> None:
    class Remembering(Follower):
        def step(self, states: Any, inputs: Any) -> Any:
            kept = getattr(self, "kept", None)
            if kept is not None and len(kept) == len(inputs):
                states = {**states, "h": kept}
            result = super().step(states, inputs)
            self.kept = result[0]["h"]
            return result

    found = failures(Remembering)
    assert "rows may come in any order, another one at each step" in found
    assert "others may leave half-way" in found


def test_a_request_that_begins_differently_each_time_is_found() -> None:
    class Random(Follower):
        def begin(self, request: Any) -> Any:
            return {**super().begin(request), "h": torch.randn(4)}

    assert "the same request begins and goes the same way again" in failures(Random)


def test_a_chunk_that_depends_on_the_cut_is_found() -> None:
    class Cut(Pairs):
        def chunk(self, data: bytes) -> Any:
            return [data] if data else [], b""

    assert list(failures(Cut)) == ["bytes may be cut at any border"]


def test_a_chunk_that_loses_bytes_is_found() -> None:
    class Lossy(Pairs):
        def chunk(self, data: bytes) -> Any:
            return super().chunk(data)[0], b""

    assert "bytes may be cut at any border" in failures(Lossy)


def test_a_sequence_without_an_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_conformance, "MAX_STEPS", 100)

    class Endless(Follower):
        def step(self, states: Any, inputs: Any) -> Any:
            return states, [None] * len(inputs), [False] * len(inputs)

        def examples(self) -> list[Any]:
            return [1]

    assert "did not end within" in failures(Endless)["its examples() go through to their end, alone"]


def test_an_end_that_raises_is_found() -> None:
    class Rude(Follower):
        def end(self, state: Any) -> None:
            raise KeyError("x")

    assert "end raised" in failures(Rude)["end(state) raises nothing, finished or cancelled"]


def test_a_model_that_takes_what_it_cannot_run_is_told_to_refuse_it() -> None:
    class Trusting(Follower):
        def preprocess(self, item: Any) -> Any:
            return float(item) if isinstance(item, int) else item

    (detail,) = failures(Trusting).values()
    assert "raise ValueError in preprocess, chunk or begin" in detail


def test_a_model_in_training_mode_is_found() -> None:
    class Training(Follower):
        def load(self, device: str) -> None:
            super().load(device)
            self.cell.train()

    assert failures(Training) == {
        "every module is in eval mode": "self.cell is in training mode: call .eval() in load"
    }


def test_states_that_need_a_key_are_found() -> None:
    class Sized(Follower):
        def begin(self, request: Any) -> Any:
            return {**super().begin(request), "extra": torch.zeros(int(abs(request)))}

    assert any("declare key(request)" in detail for detail in failures(Sized).values())


def test_load_that_raises_is_reported() -> None:
    class Broken(Follower):
        def load(self, device: str) -> None:
            raise SystemExit("weights.bin is missing")

    with pytest.raises(ModelClassError, match=r"Broken.load raised SystemExit: weights\.bin is missing"):
        check_step_model(Broken, {})


def test_the_command_steps_a_step_wise_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stepper.py").write_text(
        "import torch\n"
        "class Once:\n"
        "    def load(self, device): pass\n"
        "    def begin(self, request):\n"
        "        if type(request) is not int: raise ValueError('a whole number, please')\n"
        "        return {'x': torch.tensor(request)}\n"
        "    def step(self, states, inputs):\n"
        "        return states, states['x'].tolist(), [True] * len(inputs)\n"
        "    def examples(self): return [1, 2]\n"
        "class Short(Once):\n"
        "    def step(self, states, inputs): return states, [1], [True]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["stepper:Once"]) == 0
    assert "Once: passed" in capsys.readouterr().out
    assert main(["stepper:Short"]) == 1
    assert "step returned 1 outputs for a batch of 8" in capsys.readouterr().out
