"""The shipped models' variants: what they keep of the eager model's answers."""

import pytest
import torch

from deployments.models.efficientnet import EfficientNetLite0
from deployments.models.minilm import MiniLM
from deployments.runtime.adapter import Adapter
from deployments.runtime.optimise import linears
from scripts.bench import inputs
from scripts.bench.plain_models import PlainEfficientNet

TEXTS = inputs.texts(24)


def loaded(args: dict[str, bool], *optimise: str) -> Adapter:
    adapter = Adapter(MiniLM, args, optimise)
    adapter.load("cpu")
    return adapter


def embed(adapter: Adapter, texts: list[str]) -> torch.Tensor:
    return torch.tensor([adapter.postprocess(x) for x in raw(adapter, texts)])


def raw(adapter: Adapter, texts: list[str]) -> list[object]:
    return adapter.forward_batch([adapter.preprocess(text) for text in texts])


@pytest.fixture(scope="module")
def eager() -> torch.Tensor:
    return embed(loaded({"packed": False}), TEXTS)


@pytest.mark.skipif(not linears.has_fast_int8(), reason="this CPU has no AVX512-VNNI")
def test_calibrated_8_bits_keep_the_direction_and_know_no_batch_mates(eager: torch.Tensor) -> None:
    adapter = loaded({}, "int8")
    found = embed(adapter, TEXTS)
    cosines = (found * eager).sum(1)
    assert cosines.mean() >= 0.995
    assert cosines.min() >= 0.98
    alone = torch.cat([embed(adapter, [text]) for text in TEXTS[:6]])
    assert torch.equal(alone, found[:6])  # bit for bit: its sums are of whole numbers


def test_torchs_dynamic_8_bits_are_as_far_off_as_the_default_bound_refuses(eager: torch.Tensor) -> None:
    adapter = loaded({}, "dynamic_int8")
    found = embed(adapter, TEXTS)
    assert 1 - (found * eager).sum(1).mean() > 0.005
    alone = torch.cat([embed(adapter, [text]) for text in TEXTS[:6]])
    assert (alone - found[:6]).abs().max() > 1e-3  # one scale for all of a batch


def test_packed_is_the_default_and_may_be_asked_for(eager: torch.Tensor) -> None:
    for adapter in (loaded({}), loaded({"packed": False}, "packed")):
        assert (embed(adapter, TEXTS[:4]) - eager[:4]).abs().max() < 1e-5


def test_the_plain_classifier_is_the_shipped_one() -> None:
    shipped = EfficientNetLite0()
    shipped.load("cpu")
    batch = torch.stack([shipped.preprocess(jpeg) for jpeg in inputs.jpegs(4)])
    x = batch.permute(0, 3, 1, 2).float().sub(127.0).div(128.0)
    with torch.inference_mode():
        wanted = PlainEfficientNet()(x).softmax(-1)
        found = shipped.forward(batch)
    assert torch.equal(found["index"][:, 0], wanted.argmax(-1))
    assert torch.allclose(found["probability"][:, 0], wanted.amax(-1), atol=1e-4)
