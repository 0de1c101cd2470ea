"""Variants are applied after load: the model's own way first, then the generic one; refusals name them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.core import variants
from deployments.runtime.adapter import Adapter, ModelClassError
from deployments.runtime.optimise import capture, linears
from deployments.runtime.optimise.fingerprint import fingerprint


class Plain:
    """Two layers and an item of 16 numbers."""

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
        ).eval()
        self.net.to(device)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.net(batch)
        return answer

    def examples(self) -> list[list[float]]:
        return [[float(i) for i in range(16)], [0.5] * 16]


class Wide(Plain):
    """Sizes that every kernel takes."""

    sizes = (64, 32)

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        width, outputs = self.sizes
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, 128), torch.nn.ReLU(), torch.nn.Linear(128, outputs)
        ).eval()

    def examples(self) -> list[list[float]]:
        torch.manual_seed(3)
        return torch.randn(4, self.sizes[0]).tolist()  # type: ignore[no-any-return]


class Narrow(Wide):
    """Inputs that are no multiple of 32."""

    sizes = (20, 16)

    def load(self, device: str) -> None:
        self.net = torch.nn.Sequential(torch.nn.Linear(20, 16)).eval()


class NoModules(Plain):
    def load(self, device: str) -> None:
        self.weight = torch.ones(16)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * self.weight


class Images(Plain):
    """Items of 3 x 8 x 8; a chain that fuses, then a residual."""

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        self.net = Convolutional().eval()
        with torch.inference_mode():
            self.net.norm.running_mean.normal_()
            self.net.norm.running_var.uniform_(0.5, 2.0)

    def examples(self) -> list[Any]:
        torch.manual_seed(3)
        return torch.randn(2, 3, 8, 8).tolist()  # type: ignore[no-any-return]


class Training(Images):
    def load(self, device: str) -> None:
        self.net = Convolutional().train()


class Convolutional(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.act = torch.nn.ReLU()
        self.last, self.last_norm = torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        found: torch.Tensor = (self.last_norm(self.last(y)) + y).mean((2, 3))
        return found


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if len(x) > 1 else x - 7


class Branching(Plain):
    def load(self, device: str) -> None:
        self.net = Branch().eval()  # type: ignore[assignment]


class Own(Plain):
    def optimise(self, variant: str) -> bool:
        self.asked = variant
        return variant == "int8"


def answers(model_class: type, *optimise: str) -> Any:
    adapter = Adapter(model_class, {}, optimise)
    adapter.load("cpu")
    return torch.stack(
        [
            torch.as_tensor(x)
            for x in adapter.forward_batch([adapter.preprocess(x) for x in adapter.examples()])
        ]
    )


def test_own_way_comes_first() -> None:
    adapter = Adapter(Own, {}, ["int8"])
    adapter.load("cpu")
    assert adapter.model.asked == "int8"
    assert type(adapter.model.net[0]) is torch.nn.Linear


def test_bf16_is_close_and_answers_in_float32() -> None:
    eager, half = answers(Plain), answers(Plain, "bf16")
    assert half.dtype == torch.float32
    assert not torch.equal(eager, half)
    assert torch.allclose(eager, half, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["int9"], "no variant 'int9'; did you mean 'int8'"),
        (["int8", "bf16"], "'int8' and 'bf16' exclude each other"),
        (["bf16", "bf16"], "'bf16' twice"),
        (["fp16"], "'fp16' needs cuda; this model runs on cpu"),
    ],
)
def test_what_cannot_be_is_refused_by_name(names: list[str], words: str) -> None:
    with pytest.raises(ModelClassError, match=r"^optimise: ") as caught:
        answers(Plain, *names)
    assert words in str(caught.value)


def test_order_is_the_tables_own() -> None:
    assert variants.check(["compile", "fuse"]) == ("fuse", "compile")


@pytest.mark.parametrize("name", ["packed", "int8", "int8_weights", "int4_weights", "dynamic_int8"])
def test_linears_are_replaced_and_answers_stay_close(name: str) -> None:
    if name == "int8" and not linears.has_fast_int8():
        pytest.skip("this CPU has no AVX512-VNNI")
    eager, found = answers(Wide), answers(Wide, name)
    error = (found - eager).norm() / eager.norm()
    assert error < {"packed": 1e-5, "int4_weights": 0.15}.get(name, 0.03)
    assert (error > 1e-4) == (name != "packed")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int8", "it has no nn.Linear"),
        ("int4_weights", "it has no nn.Linear"),
        ("packed", "it has no nn.Linear"),
        ("torchscript", "its forward calls no nn.Module"),
        ("channels_last", "it holds no nn.Module"),
        ("fuse", "it holds no nn.Module"),
        ("bf16", "it holds no nn.Module"),
    ],
)
def test_a_model_without_the_layers_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ModelClassError) as caught:
        answers(NoModules, name)
    assert str(caught.value).startswith(f"optimise: {name!r} can't be applied to NoModules: {words}")


def test_groups_of_32_are_needed_for_4_bits() -> None:
    with pytest.raises(ModelClassError, match=r"no nn.Linear has inputs in groups of 32"):
        answers(Narrow, "int4_weights")


@pytest.mark.parametrize("names", [("fuse",), ("channels_last",), ("fuse", "channels_last")])
def test_images_give_the_same(names: tuple[str, ...]) -> None:
    eager, found = answers(Images), answers(Images, *names)
    assert (found - eager).abs().max() < 1e-5


def test_fuse_leaves_no_norm_and_no_activation() -> None:
    adapter = Adapter(Images, {}, ["fuse"])
    adapter.load("cpu")
    kinds = {type(module) for module in adapter.model.net.modules()}
    assert not kinds & {torch.nn.BatchNorm2d, torch.nn.ReLU, torch.nn.Conv2d}


def test_a_norm_left_in_training_is_refused() -> None:
    with pytest.raises(ModelClassError, match="in training or has no running statistics"):
        answers(Training, "fuse")


def test_torchscript_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    eager, found = answers(Plain), answers(Plain, "torchscript")
    assert torch.allclose(eager, found, atol=1e-5)
    monkeypatch.setattr(torch.jit, "trace", None)  # a second load makes nothing new
    assert torch.equal(answers(Plain, "torchscript"), found)


def test_a_branch_that_the_trace_lost_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelClassError, match=r"'torchscript'.*gives other answers for inputs of shape"):
        answers(Branching, "torchscript")


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture.shutil, "which", lambda name: None)
    for name in ("export", "compile"):
        with pytest.raises(ModelClassError, match=f"'{name}' can't be applied to Plain: it compiles C"):
            answers(Plain, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "compile"])
def test_compiled_forms_answer_the_same_and_survive_restarts(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    eager, found = answers(Plain), answers(Plain, name)
    assert torch.allclose(eager, found, atol=1e-5)
    if name == "export":
        monkeypatch.setattr(torch.export, "export", None)
        assert torch.equal(answers(Plain, name), found)


def test_a_row_of_int8_is_the_same_in_any_batch_and_dynamic_is_not() -> None:
    alone = {name: batch_of(name, outlier=False) for name in ("int8", "dynamic_int8")}
    beside = {name: batch_of(name, outlier=True) for name in ("int8", "dynamic_int8")}
    if linears.has_fast_int8():
        assert torch.equal(alone["int8"], beside["int8"])
    assert not torch.allclose(alone["dynamic_int8"], beside["dynamic_int8"], rtol=0.05)


def batch_of(name: str, *, outlier: bool) -> torch.Tensor:
    """Of row 0, beside a row of its size or one a hundred times as large."""
    torch.manual_seed(1)
    adapter = Adapter(Wide, {}, [name] if name != "int8" or linears.has_fast_int8() else [])
    adapter.load("cpu")
    row = torch.randn(64)
    return torch.as_tensor(adapter.forward_batch([row, row * (100.0 if outlier else 1.0)])[0])


def test_what_is_kept_on_disk_belongs_to_weights_settings_and_shapes() -> None:
    def conv(stride: int = 1) -> torch.nn.Conv2d:
        torch.manual_seed(0)
        return torch.nn.Conv2d(1, 1, 3, stride=stride)

    rows = [(torch.zeros(1, 1, 8, 8),)]
    names = {fingerprint(conv(), rows), fingerprint(conv(2), rows)}
    names.add(fingerprint(conv(), [(torch.zeros(1, 1, 9, 9),)]))
    other = conv()
    other.weight.data += 1e-3
    names.add(fingerprint(other, rows))
    assert len(names) == 4
    assert fingerprint(conv(), rows) in names
