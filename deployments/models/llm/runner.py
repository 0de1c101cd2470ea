"""Runs the engine's steps on a decoder-only network: a ragged forward, one sampling call, the outcomes.

Owns: the order of a step and who fails when something does. Must not know: how tokens are chosen
(sampler.py), what text they make (choice.py), who goes next (engine/scheduler.py).
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Protocol

import torch

from deployments.core.errors import ModelBroken, ModelFailed, ServingError
from deployments.engine.sequence import Advance, Copy, Sequence, Step
from deployments.models.llm.choice import Choice, Sampled
from deployments.models.llm.layout import Layout, arrange
from deployments.models.llm.network import Attention, Network
from deployments.models.llm.sampler import Sampler
from deployments.runtime.device import is_device_lost


class Store(Protocol):
    """Keys and values of all sequences, and of the prefix cache."""

    def save(self, copies: Values[Copy]) -> None: ...

    def free(self, slots: Values[int]) -> None: ...

    def load(self, copies: Values[Copy]) -> None: ...

    def attention(self, layout: Layout, positions: torch.Tensor) -> Attention: ...


@dataclass(slots=True)
class StepTimes:
    """Of the last step, seconds: the forward (on a GPU: until it is queued), choosing tokens, making text."""

    run_s: float = 0.0
    sample_s: float = 0.0
    accept_s: float = 0.0


class Eager:
    """The forward of one step, operator by operator."""

    def __init__(self, network: Network, store: Store) -> None:
        self._network, self._store = network, store

    def __call__(self, layout: Layout) -> torch.Tensor | None:
        """Logits [n, V] float32 of the n rows after which a token is sampled; None without any."""
        positions = layout.positions().to(self._network.device)
        ids = torch.tensor(layout.ids(), device=self._network.device)
        hidden = self._network(ids, positions, self._store.attention(layout, positions))
        rows = layout.last_rows()
        if not rows:
            return None
        return self._network.logits(hidden if len(rows) == layout.rows else hidden[rows])


class LLMRunner:
    """The engine's Runner. Each sequence's payload is its Choice. times: of the last step, for /stats."""

    def __init__(
        self, forward: Callable[[Layout], torch.Tensor | None], store: Store, sampler: Sampler
    ) -> None:
        self._forward, self._store, self._sampler = forward, store, sampler
        self.times = StepTimes()
        self.has_lost_device = False

    def run(self, step: Step) -> list[Advance]:
        try:
            return self._run(step)
        except BaseException as error:
            self.has_lost_device = self.has_lost_device or is_device_lost(error)
            raise

    @torch.inference_mode()
    def _run(self, step: Step) -> list[Advance]:
        self._store.save(step.saves)
        self._store.free(step.freed)
        self._store.load(step.loads)
        advances = [Advance() for _ in step.work]
        if not step.work:
            return advances
        began = time.perf_counter()
        layout = arrange(step.work)
        logits = self._forward(layout)  # [n, V] float32, or None
        ran = sampled = time.perf_counter()
        if logits is not None:
            pairs = zip(layout.works, layout.places, strict=True)
            lasting = [(work.sequence, place) for work, place in pairs if work.is_last]
            tokens = self._sampler.sample(logits, [sequence.payload for sequence, _ in lasting])
            sampled = time.perf_counter()
            for (sequence, place), token in zip(lasting, tokens, strict=True):
                advances[place] = _accept(sequence, token)
        self.times = StepTimes(ran - began, sampled - ran, time.perf_counter() - sampled)
        return advances


def _accept(sequence: Sequence, sampled: Sampled) -> Advance:
    """What the token makes of one sequence; whatever fails here fails this sequence alone."""
    if not sampled.is_finite:
        return Advance(error=ModelBroken("the model's logits hold NaN or Infinity"))
    choice: Choice = sequence.payload
    try:
        delta = choice.accept(sampled, cached_tokens=sequence.cached)
    except ServingError as error:
        return Advance(error=error)
    except Exception as error:  # of one sequence's text or grammar: its batch-mates go on
        return Advance(error=ModelFailed.of("the token that was chosen could not be taken", error))
    is_done = delta.finish_reason is not None
    return Advance(units=0 if is_done else 1, token=sampled.token, outputs=(delta,), is_done=is_done)
