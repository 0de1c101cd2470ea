"""Models whose best setting is known: they wait, and compute nothing."""

import threading
import time
from typing import Any

_LOCK = threading.Lock()


class Knee:
    """20 ms for each 8 items begun and 0.2 ms an item: batches of 8 bring almost everything."""

    def load(self, device: str) -> None:
        pass

    def preprocess(self, item: Any) -> float:
        return float(item)

    def collate(self, examples: list[float]) -> list[float]:
        return examples

    def split(self, outputs: list[float], n: int) -> list[float]:
        return outputs

    def forward(self, batch: list[float]) -> list[float]:
        time.sleep(0.02 * -(-len(batch) // 8) + 0.0002 * len(batch))
        return batch

    def examples(self) -> list[float]:
        return [1.0, 2.0]


class Locked(Knee):
    """Threads that share it, or copies, wait for each other."""

    def forward(self, batch: list[float]) -> list[float]:
        with _LOCK:
            return super().forward(batch)


class Mute(Knee):
    """Nothing to measure it with."""

    def examples(self) -> list[float]:
        return []


class Raises(Knee):
    """Its examples run alone, but not together."""

    def forward(self, batch: list[float]) -> list[float]:
        raise RuntimeError("no such weights")


class Stepper:
    """5 ms a step, whatever shares it: more sequences are more steps a second."""

    def load(self, device: str) -> None:
        pass

    def begin(self, request: Any) -> dict[str, Any]:
        import torch

        return {"left": torch.tensor(int(request))}

    def step(self, states: dict[str, Any], inputs: list[Any]) -> tuple[dict[str, Any], list[Any], list[bool]]:
        time.sleep(0.005)
        left = states["left"] - 1
        return {"left": left}, [int(n) for n in left], [bool(n <= 0) for n in left]

    def examples(self) -> list[int]:
        return [6, 9]
