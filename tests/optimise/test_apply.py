"""Variants are applied after load: the model's own way first, then the generic one; refusals name them."""

from typing import Any

import pytest
import torch

from deployments.core import variants
from deployments.runtime.adapter import Adapter, ModelClassError


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
