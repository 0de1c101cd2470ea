"""A variant serves only where it was shown to be right and faster; a refusal says both figures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.audit.comparison import error_of
from deployments.audit.target import Target
from deployments.audit.variant import refusal_of, verify
from scripts.variants import main

MODELS = """
import time, torch

class Base:
    nap_s = 0.01
    def load(self, device):
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 4).eval()
        self.added, self.mean = 0.0, False
    def forward(self, batch):
        time.sleep(self.nap_s)
        y = self.net(batch) + self.added
        return y + 0.1 * batch.abs().max() if self.mean else y
    def examples(self):
        return [[1.0] * 8, [float(n) for n in range(8)]]

class Faster(Base):
    def optimise(self, variant):
        self.nap_s = 0.001
        return True

class Wrong(Base):
    def optimise(self, variant):
        self.nap_s, self.added = 0.001, 2.0
        return True

class Mixing(Base):
    def optimise(self, variant):
        self.nap_s, self.mean = 0.001, True
        return True
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("variants") / "sleepers.py"
    file.write_text(MODELS)
    asked = {"Faster": None, "Wrong": None, "Mixing": 10.0}
    return {
        name: verify(
            Target(f"{file}:{name}", folder=str(file.parent)), ["int8"], bound, budget_s=0.5, batch_size=4
        )
        for name, bound in asked.items()
    }


def test_right_and_faster_is_accepted(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["Faster"]
    assert found["accepted"], found["reason"]
    assert found["measure"] == "relative"
    assert found["mean_error"] == found["worst_error"] == 0.0
    assert found["speedup"] > 1.5
    assert found["audit"]["batch_invariant"]["holds"] is True


def test_what_is_off_is_refused_with_both_figures(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["Wrong"]
    assert not found["accepted"]
    assert "mean error" in found["reason"]
    assert "is over max_error 0.1" in found["reason"]
    assert "times as fast" in found["reason"]


@pytest.mark.parametrize(
    ("mean_error", "speedup", "words"),
    [
        (0.001, 0.9, "not faster here: 0.90 times as fast"),
        (0.2, 2.0, "mean error 0.2 (relative) is over max_error 0.1"),
        (math.nan, 2.0, "mean error nan"),
        (0.001, 2.0, ""),
    ],
)
def test_both_bounds_are_held(mean_error: float, speedup: float, words: str) -> None:
    known = {"measure": "relative", "mean_error": mean_error, "worst_error": mean_error, "speedup": speedup}
    refusal = refusal_of(known, 0.1)
    assert words in refusal
    assert bool(refusal) == bool(words)


def test_what_makes_batch_mates_meet_is_refused_however_much_error_is_allowed(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    found = outcomes["Mixing"]
    assert not found["accepted"]
    assert "answers depend on batch-mates" in found["reason"]


def test_a_variant_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "plainest.py"
    file.write_text(MODELS)
    found = verify(Target(f"{file}:Base", folder=str(tmp_path)), ["channels_last"], budget_s=0.5)
    assert not found["accepted"]
    assert "optimise: 'channels_last' can't be applied to Base: it has no nn.Conv2d" in found["reason"]


def test_by_hand_it_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "by_hand.py"
    file.write_text(MODELS)
    asked = [f"{file}:Wrong", "--optimise", "int8", "--budget-s", "0.5", "--batch-size", "4"]
    assert main(asked) == 1
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("variant")
    assert row.startswith("int8")
    assert "is over max_error" in row
    assert main([f"{file}:Wrong", "--optimise", "int9"]) == 2


@pytest.mark.parametrize(
    ("measure", "one", "other", "error"),
    [
        ("cosine", torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), 0.0),
        ("cosine", torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1.0),
        ("relative", np.array([3.0, 4.0]), np.array([3.0, 4.5]), 0.1),
        ("relative", torch.tensor([1.0]), torch.tensor([math.nan]), math.inf),
        ("relative", torch.tensor([1.0]), torch.tensor([1.0, 1.0]), math.inf),
        ("top1", torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6]), 0.0),
        ("top1", {"index": torch.tensor([5, 3])}, {"index": torch.tensor([3, 5])}, 1.0),
        ("agreement", {"n": 3, "p": 0.5}, {"n": 3, "p": 0.7}, 0.0),
        ("agreement", ["a", "b"], ["a", "c"], 0.5),
    ],
)
def test_error_is_the_measures(measure: str, one: Any, other: Any, error: float) -> None:
    assert error_of(measure, one, other) == pytest.approx(error)
