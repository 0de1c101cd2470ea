"""The diffusion sampler: its images are of the mixture, and nobody's mates change them."""

from typing import Any

import pytest
import torch

from deployments.core.errors import InvalidItem
from deployments.engine.sequence import Sequence, Step, Work
from deployments.models.denoiser import COMPONENTS, Denoiser, draw_means
from deployments.runtime.difference import difference
from deployments.runtime.stepwise import StepModel


@pytest.fixture(scope="module")
def model() -> StepModel:
    model = StepModel(Denoiser, {})
    model.load("cpu", 64)
    return model


def prepare(model: StepModel, item: dict[str, Any]) -> Sequence:
    return model.prepare(model.read_item(item))


def run(model: StepModel, sequences: list[Sequence]) -> list[Any]:
    """All together until each is done; the answers of /predict."""
    outputs: list[list[Any]] = [[] for _ in sequences]
    live = list(range(len(sequences)))
    while live:
        works = [Work(sequences[i], sequences[i].computed, 1, True) for i in live]
        advances = model.run(Step(works, [], [], [], [], "", 0.0))
        for i, advance in zip(live, advances, strict=True):
            assert advance.error is None
            sequences[i].computed += 1
            outputs[i] += advance.outputs
        live = [i for i, advance in zip(live, advances, strict=True) if not advance.is_done]
    model.run(Step([], [], [], list(sequences), [], "", 0.0))
    return [model.postprocess(found) for found in outputs]


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_an_image_lies_as_close_to_a_component_as_the_mixture_says(
    model: StepModel, size: int, sampler: str
) -> None:
    items = [{"size": size, "steps": 50, "seed": seed, "sampler": sampler} for seed in range(4)]
    answers = run(model, [prepare(model, item) for item in items])
    images = torch.tensor([answer["image"] for answer in answers]).flatten(1)
    distances = torch.cdist(images, draw_means(size)).min(1).values / size  # root mean square, a pixel
    assert all(0.015 < float(distance) < 0.055 for distance in distances)  # of a deviation of 0.05
    assert len({torch.cdist(image[None], draw_means(size)).argmin().item() for image in images}) > 1


def test_the_mixture_is_the_same_at_every_size() -> None:
    small, large = draw_means(16), draw_means(64)
    assert small.shape == (COMPONENTS, 256)
    pooled = torch.nn.functional.avg_pool2d(large.view(-1, 1, 64, 64), 4).flatten(1)
    assert float((pooled - small).abs().mean()) < 0.03


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_same_request_gives_the_same_image_whoever_shares_its_steps(
    model: StepModel, sampler: str
) -> None:
    items = [{"size": 32, "steps": 4 + 3 * i, "seed": i, "sampler": sampler} for i in range(8)]
    together = run(model, [prepare(model, item) for item in items])
    for item, answer in zip(items, together, strict=True):
        (alone,) = run(model, [prepare(model, item)])
        assert difference(alone, answer) < 1e-4
        assert answer["steps"] == item["steps"]


def test_other_seeds_and_samplers_give_other_images(model: StepModel) -> None:
    items: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 1, "sampler": "ancestral"}]
    answers = [run(model, [prepare(model, {"size": 16, "steps": 4, **item})])[0] for item in items]
    assert all(difference(answers[0], other) > 0.01 for other in answers[1:])


def test_size_and_sampler_are_the_key_and_pixels_the_cost(model: StepModel) -> None:
    large, small = prepare(model, {}), prepare(model, {"size": 32, "sampler": "ancestral"})
    assert (large.key, large.cost) == ((64, "ddim"), 1.0)
    assert (small.key, small.cost) == ((32, "ancestral"), 0.25)


@pytest.mark.parametrize(
    "item",
    [None, [], "x", {"step": 3}, {"steps": 3}, {"steps": 51}, {"steps": 4.0}, {"steps": True}, {"size": 48},
     {"size": 10**9}, {"seed": -1}, {"seed": 2**31}, {"sampler": "euler"}, {"sampler": []}, {"seed": "1"}],
    ids=repr,
)  # fmt: skip
def test_requests_that_cannot_be_are_refused(model: StepModel, item: Any) -> None:
    with pytest.raises(InvalidItem):
        model.read_item(item)
