"""Models that answer wrong when they are used carelessly, and one whose batches take much memory.

Owns: these classes, as users write them; served as `scripts.bench.unsafe_models:NAME`.
"""

from typing import Any, ClassVar

import torch


class Scratch:
    """Every part leaves a note on the instance that a later one reads: the item's size, one scratch buffer.

    Right alone, right in a pool; two threads in one instance mix their callers' data.
    """

    def load(self, device: str) -> None:
        source = torch.Generator().manual_seed(0)
        self._mix = torch.randn(256, 256, generator=source).to(device) / 16
        self._buffer = torch.zeros(256, device=device)

    def preprocess(self, item: Any) -> torch.Tensor:
        self._asked = float(item)
        return torch.linspace(0.0, float(item), 256)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self._buffer.copy_(batch[0])
        for _ in range(6):
            self._buffer.copy_(torch.tanh(self._mix @ self._buffer))
        return self._buffer.clone().unsqueeze(0)

    def postprocess(self, output: torch.Tensor) -> list[float]:
        return [self._asked, float(output.sum())]

    def examples(self) -> list[float]:
        return [0.5, 1.5, -1.0]


class Global:
    """Its scratch memory is a class attribute: copies share it, only processes keep apart."""

    _seen: ClassVar[dict[str, torch.Tensor]] = {}

    def load(self, device: str) -> None:
        source = torch.Generator().manual_seed(0)
        self._mix = torch.randn(256, 256, generator=source).to(device) / 16

    def forward(self, batch: torch.Tensor) -> torch.Tensor:  # [B] -> [B, 2]
        self._seen["now"] = torch.linspace(0.0, 1.0, 256) * batch[0]
        for _ in range(6):
            self._seen["now"] = torch.tanh(self._mix @ self._seen["now"])
        return torch.stack([batch[:1], self._seen["now"].sum().view(1)], dim=1).repeat(len(batch), 1)

    def examples(self) -> list[float]:
        return [0.5, 1.5, -1.0]


class Roomy:
    """An item of cost n takes n / 4 MiB while it runs; a batch takes as long as 4 + c / 32 products."""

    cost_unit = "256 KiB"

    def load(self, device: str) -> None:
        self._device = device

    def preprocess(self, item: Any) -> int:
        return int(item)

    def cost(self, example: int) -> float:
        return float(example)

    def collate(self, examples: list[int]) -> list[int]:
        return examples

    def forward(self, batch: list[int]) -> list[float]:
        rows = torch.ones(sum(batch), 2**16, device=self._device)
        parts = torch.split(rows, batch)
        busy = torch.ones(400, 400)
        for _ in range(4 + sum(batch) // 32):
            busy = busy @ busy / 400
        return [float(part[:, 0].sum()) for part in parts]

    def split(self, outputs: list[float], n: int) -> list[float]:
        return outputs

    def examples(self) -> list[int]:
        return [1, 8]
