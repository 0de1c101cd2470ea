"""The shipped models' variants against plain eager: how much faster, and how far off.

All forms of a model take turns on the same batches in one process, so that what else runs on the machine is
everybody's; the ratio is of medians. Texts to measure quality on are not those that int8 is calibrated with.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from deployments.models.efficientnet import EfficientNetLite0
from deployments.models.minilm import MiniLM
from deployments.runtime.adapter import Adapter
from deployments.runtime.device import set_threads
from scripts.bench import inputs
from scripts.bench.plain_models import PlainEfficientNet
from scripts.bench.report import Report, least, say

Form = Callable[[Any], torch.Tensor]

TEXTS, IMAGES = 32, 16
"""In a batch."""


def run(*, is_short: bool) -> Report:
    threads = set_threads()
    rounds = 4 if is_short else 16
    with torch.inference_mode():
        figures = {"minilm": _minilm(rounds, is_short), "efficientnet": _efficientnet(rounds, is_short)}
    return Report(
        "variants",
        figures,
        [
            least("minilm.int8.speedup", 2.0),
            least("minilm.int8.cosine_mean", 0.995),
            least("efficientnet.packed.speedup", 1.4),
            least("efficientnet.packed.top1_agreement", 0.99),
        ],
        {"texts_a_batch": TEXTS, "images_a_batch": IMAGES, "rounds": rounds, "threads": threads},
        is_short,
    )


def _minilm(rounds: int, is_short: bool) -> dict[str, Any]:
    forms = {
        "eager": _loaded({"packed": False}),
        "packed": _loaded({}),
        "int8": _loaded({}, "int8"),
        "dynamic_int8": _loaded({}, "dynamic_int8"),
    }
    eager = forms["eager"]
    examples = [eager.preprocess(text) for text in inputs.texts(64 if is_short else 256)]
    batches = [eager.collate(examples[n : n + TEXTS]) for n in range(0, len(examples), TEXTS)]
    runs: dict[str, Form] = {name: adapter.forward for name, adapter in forms.items()}
    wanted = [runs["eager"](batch) for batch in batches]
    found: dict[str, Any] = _times(runs, batches[:2], rounds)
    for name, form in runs.items():
        pairs = zip(wanted, batches, strict=True)
        cosines = torch.cat([torch.cosine_similarity(one, form(batch)) for one, batch in pairs])
        found[name] |= {
            "cosine_mean": round(float(cosines.mean()), 5),
            "cosine_worst": round(float(cosines.min()), 5),
        }
        say(f"  minilm {name}: {found[name]}")
    return found


def _loaded(args: Mapping[str, Any], *optimise: str) -> Adapter:
    adapter = Adapter(MiniLM, args, optimise)
    adapter.load("cpu")
    return adapter


def _efficientnet(rounds: int, is_short: bool) -> dict[str, Any]:
    plain, shipped = PlainEfficientNet(), EfficientNetLite0()
    shipped.load("cpu")
    images = [shipped.preprocess(jpeg) for jpeg in inputs.jpegs(16 if is_short else 64)]
    batches = [torch.stack(images[n : n + IMAGES]) for n in range(0, len(images), IMAGES)]

    def eager(batch: torch.Tensor) -> torch.Tensor:
        x = batch.permute(0, 3, 1, 2).contiguous().float().sub_(127.0).div_(128.0)  # NCHW
        logits: torch.Tensor = plain(x)
        return logits.softmax(-1).topk(5).indices

    runs: dict[str, Form] = {"eager": eager, "packed": lambda batch: shipped.forward(batch)["index"]}
    found: dict[str, Any] = _times(runs, batches[:1], rounds)
    for name, form in runs.items():
        same = torch.cat([(eager(batch) == form(batch))[:, 0] for batch in batches]).double()
        found[name] |= {"top1_agreement": float(same.mean()), "images": len(same)}
        say(f"  efficientnet {name}: {found[name]}")
    return found


def _times(runs: Mapping[str, Form], batches: list[Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Median ms of a batch for each form, taking turns, and how many times as fast as eager."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, form in runs.items():
            began = time.perf_counter()
            for batch in batches:
                form(batch)
            spent[name].append(1e3 * (time.perf_counter() - began) / len(batches))
    # The first two warm up.
    middle = {name: median(times[2:]) for name, times in spent.items()}
    return {
        name: {"ms_a_batch": round(ms, 2), "speedup": round(middle["eager"] / ms, 3)}
        for name, ms in middle.items()
    }
