"""The ceilings: the same models alone, in one process, without a server.

Owns: what "the model alone" means for each benchmark, and the process it runs in (its own, so that
the server's threads and its own never mix). Each reference runs whole passes over its inputs, since
batches of a sorted list differ in cost.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Passes = Callable[[], int]
"""One pass over all inputs; returns how many there were."""


def padded_minilm(batch: int = 32) -> Passes:
    """transformers' BertModel as an offline job would run it: sorted by length, padded, mean-pooled.

    Tokenisation is left out: the model alone.
    """
    import torch
    from transformers import AutoTokenizer, BertModel

    from scripts.bench import inputs

    tokenizer = AutoTokenizer.from_pretrained(inputs.minilm_folder())
    model = BertModel.from_pretrained(inputs.minilm_folder()).eval()
    encoded = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in inputs.texts()]
    encoded.sort(key=len)
    batches = [
        tokenizer.pad({"input_ids": encoded[i : i + batch]}, return_tensors="pt")
        for i in range(0, len(encoded), batch)
    ]

    def run() -> int:
        with torch.inference_mode():
            for padded in batches:
                hidden = model(**padded).last_hidden_state
                mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                torch.nn.functional.normalize(pooled, dim=1).numpy()
        return len(encoded)

    return run


def ragged_minilm(batch: int = 32) -> Passes:
    """Our own model alone, on batches in the order of arrival, as the server forms them."""
    from scripts.bench import inputs

    return _own_model("deployments.models.minilm:MiniLM", inputs.texts(), batch)


def _own_model(target: str, items: Sequence[Any], batch: int) -> Passes:
    from deployments.runtime.adapter import Adapter, load_class

    adapter = Adapter(load_class(target), {})
    adapter.load("cpu")
    examples = [adapter.preprocess(item) for item in items]

    def run() -> int:
        for i in range(0, len(examples), batch):
            adapter.forward_batch(examples[i : i + batch])
        return len(examples)

    return run


def classify_pipeline(batch: int = 16) -> Passes:
    """EfficientNet-Lite0 as a pipeline: a decode thread ahead of a model thread, same weights."""
    from deployments.runtime.adapter import Adapter, load_class
    from scripts.bench import inputs

    adapter = Adapter(load_class("deployments.models.efficientnet:EfficientNetLite0"), {})
    adapter.load("cpu")
    # Three times round: the first batch of a pass waits for its decoding, as only a job's first does.
    images = inputs.jpegs() * 3

    def run() -> int:
        decoded: queue.Queue[Any] = queue.Queue(maxsize=2 * batch)

        def decode() -> None:
            for image in images:
                decoded.put(adapter.preprocess(image))

        thread = threading.Thread(target=decode)
        thread.start()
        for i in range(0, len(images), batch):
            examples = [decoded.get() for _ in images[i : i + batch]]
            for output in adapter.forward_batch(examples):
                adapter.postprocess(output)
        thread.join()
        return len(images)

    return run


def classify_model_alone(batch: int = 16) -> Passes:
    """EfficientNet-Lite0 on images decoded beforehand: what is left without decoding."""
    from scripts.bench import inputs

    target = "deployments.models.efficientnet:EfficientNetLite0"
    return _own_model(target, inputs.jpegs(), batch)


def one_text() -> Passes:
    """One text of 16 words through pre-processing, our model and post-processing: the idle floor."""
    from scripts.bench import inputs

    return _one_item("deployments.models.minilm:MiniLM", inputs.short_text())


def one_noop() -> Passes:
    return _one_item("scripts.bench.models:Noop", 1.0)


def _one_item(target: str, item: Any) -> Passes:
    from deployments.runtime.adapter import Adapter, load_class

    adapter = Adapter(load_class(target), {})
    adapter.load("cpu")

    def run() -> int:
        adapter.postprocess(adapter.forward_batch([adapter.preprocess(item)])[0])
        return 1

    return run


class Reference:
    """One of the above in a process of its own; `rate` and `p50_ms` measure when told to."""

    def __init__(self, make: Callable[[], Passes]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def __enter__(self) -> "Reference":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _measure(self, duration_s: float) -> list[tuple[int, float]]:
        self._pipe.send(duration_s)
        passes: list[tuple[int, float]] = self._pipe.recv()
        return passes

    def rate(self, duration_s: float) -> float:
        """Items/s over whole passes, at least one and as many as begin within the time."""
        passes = self._measure(duration_s)
        return sum(items for items, _ in passes) / sum(seconds for _, seconds in passes)

    def p50_ms(self, duration_s: float) -> float:
        """Median milliseconds of a pass."""
        seconds = sorted(seconds for _, seconds in self._measure(duration_s))
        return 1e3 * seconds[len(seconds) // 2]


def _serve(make: Callable[[], Passes], pipe: "Connection[Any, Any]") -> None:
    """In the child: load, warm up, then one measurement for each duration that comes."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = make()
    run()
    pipe.send("ready")
    while True:
        try:
            duration_s = pipe.recv()
        except EOFError:
            return
        passes: list[tuple[int, float]] = []
        began = time.perf_counter()
        while not passes or time.perf_counter() - began < duration_s:
            started = time.perf_counter()
            passes.append((run(), time.perf_counter() - started))
        pipe.send(passes)
