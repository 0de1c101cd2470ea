"""Models that cost a known time: what a benchmark of the server, not of a model, is made with.

Plain classes as CONTRACT's "Your own model" has them; served as `scripts.bench.models:Sleep`. Lists
instead of tensors, so that what is measured is the way and not torch.
"""

import time
from collections.abc import Sequence
from typing import Any

POISON = -1.0
"""PoisonSleep raises where a batch holds this; it looks like any other item until then."""


class Noop:
    """The item comes back as it is: what remains is the cost of the whole way through."""

    def load(self, device: str) -> None:
        pass

    def preprocess(self, item: Any) -> float:
        if not isinstance(item, (int, float)):
            raise ValueError("send a number")
        return float(item)

    def collate(self, examples: Sequence[float]) -> list[float]:
        return list(examples)

    def forward(self, batch: list[float]) -> list[float]:
        return batch

    def split(self, outputs: list[float], n: int) -> list[float]:
        return outputs

    def examples(self) -> list[float]:
        return [0.0, 1.0]


class TensorNoop:
    """The least that the contract asks for: every default is in the way, tensors included."""

    def load(self, device: str) -> None:
        pass

    def forward(self, batch: Any) -> Any:
        return batch

    def examples(self) -> list[float]:
        return [0.0, 1.0]


class Sleep(Noop):
    """A batch of n takes base_ms + n * item_ms and computes 2x + 1, so that answers can be checked."""

    def __init__(self, base_ms: float = 40.0, item_ms: float = 0.0) -> None:
        self._base_ms, self._item_ms = base_ms, item_ms

    def forward(self, batch: list[float]) -> list[float]:
        time.sleep((self._base_ms + len(batch) * self._item_ms) / 1e3)
        return [2.0 * x + 1.0 for x in batch]


class PoisonSleep(Sleep):
    """Sleep, but a batch with POISON in it raises, after the time a real failure would take."""

    def forward(self, batch: list[float]) -> list[float]:
        outputs = super().forward(batch)
        if POISON in batch:
            raise RuntimeError("poison")
        return outputs
