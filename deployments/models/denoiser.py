"""A diffusion sampler without weights: from noise to an image in 4 to 50 steps.

Owns: the mixture, its exact score, the two samplers. The images are drawn from a Gaussian mixture, whose
denoiser E[x0 | xt] has a closed form: a softmax over the components and their mean. Two products with
the matrix of all components make a step as heavy as a small network's, and what comes out can be checked.
Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Song et al., "Denoising Diffusion
Implicit Models" (2021), section 4.1 for both samplers; Nichol and Dhariwal (2021), the cosine schedule.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

SIZES = (16, 32, 64)
SAMPLERS = ("ddim", "ancestral")
STEPS = (4, 50)
MAX_SEED = 2**31 - 1
COMPONENTS = 2048
"""At size 64 their means are 32 MB, more than a cache holds: a batch of 8 reads them once, as a
network's weights."""

_DEVIATION = 0.05  # of a pixel around its component's mean
_FIRST_TIME = 0.99  # of the schedule's 1, where nothing of the image is left
_FIELDS = {"size": 64, "steps": 20, "seed": 0, "sampler": "ddim"}

State = dict[str, torch.Tensor]


class Denoiser:
    """{"steps", "size", "seed", "sampler"} -> {"image": size rows of size pixels around [-1, 1], "steps"}.

    The same request gives the same image, whoever shares its steps.
    """

    item_schema: ClassVar = {
        "type": "object",
        "properties": {
            "size": {"enum": list(SIZES)},
            "steps": {"type": "integer", "minimum": STEPS[0], "maximum": STEPS[1]},
            "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
            "sampler": {"enum": list(SAMPLERS)},
        },
        "additionalProperties": False,
    }
    output_schema: ClassVar = {
        "type": "object",
        "properties": {
            "image": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            "steps": {"type": "integer"},
        },
        "required": ["image", "steps"],
        "additionalProperties": False,
    }

    def load(self, device: str) -> None:
        self._device = device
        self._means = {size: draw_means(size).to(device) for size in SIZES}  # [K, size * size] each
        self._norms = {size: means.square().sum(1) for size, means in self._means.items()}

    def preprocess(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, dict) or not set(item) <= set(_FIELDS):
            raise ValueError(f"expected an object with some of the keys {list(_FIELDS)}")
        request = {**_FIELDS, **item}
        for name, low, high in (("steps", *STEPS), ("seed", 0, MAX_SEED), ("size", SIZES[0], SIZES[-1])):
            if type(request[name]) is not int or not low <= request[name] <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}")
        if request["size"] not in SIZES:
            raise ValueError(f"size must be one of {list(SIZES)}")
        if request["sampler"] not in SAMPLERS:
            raise ValueError(f"sampler must be one of {list(SAMPLERS)}")
        return request

    def key(self, request: Mapping[str, Any]) -> tuple[int, str]:
        return request["size"], request["sampler"]

    def cost(self, request: Mapping[str, Any]) -> float:
        return float((request["size"] / SIZES[-1]) ** 2)

    def begin(self, request: Mapping[str, Any]) -> State:
        size, seed = request["size"], request["seed"]
        return {
            "x": _noise(seed, 0, size * size),
            "step": torch.zeros((), dtype=torch.int64),
            "steps": torch.tensor(request["steps"]),
            "seed": torch.tensor(seed),
            "is_ancestral": torch.tensor(request["sampler"] == "ancestral"),
        }

    def step(self, states: State, inputs: list[None]) -> tuple[State, list[Any], list[bool]]:
        x, step, steps = states["x"], states["step"], states["steps"]
        signal, noise = _schedule(step / steps)
        clean = self._denoise(x, signal, noise)
        after = step + 1
        next_signal, next_noise = _schedule(after / steps)
        is_done = after == steps
        next_signal, next_noise = next_signal.masked_fill(is_done, 1.0), next_noise.masked_fill(is_done, 0.0)
        # The share of the next noise that is new: none for DDIM, the posterior's for ancestral sampling.
        fresh = next_noise / noise * (1 - (signal / next_signal).square()).clamp(min=0).sqrt()
        fresh = fresh * states["is_ancestral"]
        kept = (next_noise.square() - fresh.square()).clamp(min=0).sqrt()
        direction = (x - _column(signal) * clean) / _column(noise)
        x = _column(next_signal) * clean + _column(kept) * direction
        if bool((fresh > 0).any()):
            x = x + _column(fresh) * self._fresh_noise(states["seed"].tolist(), after.tolist(), x)
        done = is_done.tolist()
        outputs = [_output(x[i], int(steps[i])) if end else None for i, end in enumerate(done)]
        return {**states, "x": x, "step": after}, outputs, done

    def postprocess(self, outputs: list[Any]) -> Any:
        return outputs[-1]

    def examples(self) -> list[dict[str, Any]]:
        return [
            {"steps": 6, "size": 32, "seed": 1},
            {"steps": 4, "size": 32, "seed": 2},
            {"steps": 5, "size": 32, "seed": 3, "sampler": "ancestral"},
            {"steps": 4, "size": 16, "seed": 4, "sampler": "ancestral"},
        ]

    def _denoise(self, x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """E[x0 | x] of the mixture: x [B, D], signal and noise [B] -> [B, D]."""
        size = math.isqrt(x.shape[1])
        means, norms = self._means[size], self._norms[size]
        variance = (signal * _DEVIATION).square() + noise.square()  # of x around a component
        distance = _column(signal.square()) * norms - 2 * _column(signal) * (x @ means.T)  # and x's own norm
        weights = (-distance / (2 * _column(variance))).softmax(1)  # [B, K]
        shrink = _column(signal * _DEVIATION**2 / variance)
        centre = weights @ means
        return centre + shrink * (x - _column(signal) * centre)

    def _fresh_noise(self, seeds: list[int], steps: list[int], like: torch.Tensor) -> torch.Tensor:
        """Each row's from its own seed and step, so that no batch-mate can change it."""
        rows = [_noise(seed, step, like.shape[1]) for seed, step in zip(seeds, steps, strict=True)]
        return torch.stack(rows).to(like.device)


def draw_means(size: int) -> torch.Tensor:
    """[K, size * size] in [-1, 1]: soft rings of many radii and places, the same at every size."""
    generator = torch.Generator().manual_seed(7)
    across, down, radius, width = torch.rand(4, COMPONENTS, 1, 1, generator=generator)
    axis = (torch.arange(size) + 0.5) / size
    distance = torch.hypot(
        axis[None, :, None] - (0.2 + 0.6 * down), axis[None, None, :] - (0.2 + 0.6 * across)
    )
    off = (distance - (0.1 + 0.25 * radius)) / (0.03 + 0.07 * width)
    return (2 * torch.exp(-0.5 * off.square()) - 1).flatten(1)


def _schedule(progress: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps done over steps, [B] in [0, 1] -> signal and noise, whose squares add up to 1."""
    angle = (math.pi / 2) * _FIRST_TIME * (1 - progress)
    return angle.cos(), angle.sin()


def _noise(seed: int, step: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed * 64 + step))


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(1)


def _output(x: torch.Tensor, steps: int) -> dict[str, Any]:
    size = math.isqrt(len(x))
    return {"image": x.view(size, size).tolist(), "steps": steps}
