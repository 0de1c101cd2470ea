"""A step-wise class as a subject: a call steps its sequences together, to their ends or the bound.

Owns: that loop. Must not know: schedules, properties. Our own runner keeps rows on one thread; here the
class itself is asked, so states are stacked and cut in the plainest way.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from deployments.audit.target import Target
from deployments.runtime.stepwise import StepModel

MAX_STEPS = 12
"""Of a sequence; what a step leaves behind shows in the next ones."""


class StepSubject:
    """Inputs are requests, or whole streams of bytes; changes are not made: a request is anything."""

    can_batch = True
    pads = False

    def __init__(self, model_class: type, target: Target) -> None:
        self._model = StepModel(model_class, target.model_args, target.optimise)
        self._model.load(target.device, slots=8)
        self.instance = self._model.model
        self.examples: Sequence[Any] = self._model.examples()

    def call(self, batch: Any) -> list[Any]:
        requests = [self._request(item) for item in batch]
        chunks = [self._chunks(request) for request in requests]
        begun = [None if self._model.takes_chunks else request for request in requests]
        states = [self.instance.begin(request) for request in begun]
        outputs: list[list[Any]] = [[] for _ in batch]
        is_done = [False] * len(batch)
        for number in range(MAX_STEPS):
            ready = [
                n
                for n in range(len(batch))
                if not is_done[n] and (chunks[n] is None or number < len(chunks[n]))
            ]
            if not ready:
                break
            stacked = {name: torch.stack([states[n][name] for n in ready]) for name in states[ready[0]]}
            inputs = [chunks[n][number] for n in ready] if self._model.takes_chunks else None
            with torch.inference_mode():
                after, made, done = self.instance.step(stacked, inputs)
            for row, n in enumerate(ready):
                states[n] = {name: after[name][row] for name in after}
                outputs[n].append(made[row])
                is_done[n] = bool(done[row])
        return [(part, state) for part, state in zip(outputs, states, strict=True)]

    def _request(self, item: Any) -> Any:
        if item.change:
            raise ValueError("requests of a step-wise class are not changed")
        return self._model.read_item(self.examples[item.example])

    def _chunks(self, request: Any) -> Any:
        if not self._model.takes_chunks:
            return None
        chunks, _ = self.instance.chunk(bytes(request))
        return list(chunks)

    def key(self, item: Any) -> Hashable:
        return self._model.prepare(self._request(item)).key

    def length(self, item: Any) -> int:
        return 0
