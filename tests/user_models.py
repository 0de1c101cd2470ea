"""Models as users write them: plain classes, nothing of ours imported."""

import time
from typing import Any

import torch


class Doubler:
    inputs = [("x", "FP32", [-1, 4])]
    outputs = [("y", "FP32", [-1, 4])]

    def load(self, device: str) -> None:
        self.factor = torch.tensor(2.0, device=device)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:  # [B, 4] -> [B, 4]
        return batch * self.factor

    def examples(self) -> list[list[float]]:
        return [[1.0, 2.0, 3.0, 4.0]]


class Fickle:
    """Raises on what its items ask for: {"raise": name} or {"value": x, "sleep_ms": t}."""

    def load(self, device: str) -> None:
        self.sizes: list[int] = []

    def preprocess(self, item: Any) -> Any:
        if not isinstance(item, dict):
            raise ValueError("an object, please")
        return item

    def collate(self, examples: list[Any]) -> list[Any]:
        return examples

    def split(self, outputs: list[Any], n: int) -> list[Any]:
        return outputs

    def forward(self, batch: list[Any]) -> list[Any]:
        self.sizes.append(len(batch))
        for item in batch:
            time.sleep(item.get("sleep_ms", 0) / 1e3)
            name = item.get("raise")
            if name == "count":
                return [0] * (len(batch) + 1)
            if name == "MemoryError" and len(batch) <= 2:
                continue
            if name:
                raise _NAMED[name]
        return [item.get("value") for item in batch]

    def postprocess(self, output: Any) -> Any:
        return float("nan") if output == "nan" else output


_NAMED = {
    "ValueError": ValueError("the model's own text"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "MemoryError": MemoryError(),
}


class Follower:
    """docs/howto/step-wise-model.md's, which counts down; it raises at `fail_at`, gives NaN at `nan_at`."""

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        self.cell = torch.nn.GRUCell(1, 8).eval().to(device)

    def begin(self, request: Any) -> dict[str, torch.Tensor]:
        if (
            not isinstance(request, dict)
            or type(request.get("steps")) is not int
            or not 1 <= request["steps"] <= 1000
        ):
            raise ValueError('expected {"steps": 1 to 1000}')
        faults = {name: torch.tensor(int(request.get(name, 0))) for name in ("fail_at", "nan_at")}
        return {"hidden": torch.zeros(8), "left": torch.tensor(request["steps"]), **faults}

    def step(
        self, states: dict[str, torch.Tensor], inputs: list[None]
    ) -> tuple[dict[str, torch.Tensor], list[float], list[bool]]:
        left = states["left"]
        if bool((left == states["fail_at"]).any()):
            raise RuntimeError("the model's own text")
        hidden = self.cell(left.float().unsqueeze(1), states["hidden"])
        outputs = hidden.mean(1).masked_fill(left == states["nan_at"], torch.nan)
        return states | {"hidden": hidden, "left": left - 1}, outputs.tolist(), (left == 1).tolist()

    def examples(self) -> list[dict[str, int]]:
        return [{"steps": 3}, {"steps": 5}]


class NoForward:
    def load(self, device: str) -> None: ...


class LoadRaises:
    def load(self, device: str) -> None:
        raise OSError("weights.bin is missing")

    def forward(self, batch: Any) -> Any:
        return batch


class WrongCount:
    def load(self, device: str) -> None: ...

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.sum(dim=0, keepdim=True).repeat(3, 1)
