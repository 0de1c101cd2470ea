"""Small models of the kinds that are met in the field, safe and unsafe twins, each with what is true of it.

`TRUTH`: class name -> the properties that are false; all others hold or can't be decided. Not part of the
audit: it never sees this file's answers.
"""

import contextvars
import random
import threading
import warnings
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

D = 8


def numbers(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape or (D,)).round(4).tolist()


class Kind:
    """A linear layer and examples of one shape."""

    def load(self, device: str) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(D, D).eval()
        self.set_up()

    def set_up(self) -> None: ...

    def examples(self) -> list[Any]:
        return [numbers(1), numbers(2), numbers(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Ragged(Kind):
    """[T, D] of different lengths, padded to the longest."""

    def examples(self) -> list[Any]:
        return [numbers(1, 3, D), numbers(2, 5, D), numbers(3, 3, D)]

    def collate(self, examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        longest = max(map(len, examples))
        padded = torch.stack([F.pad(e, (0, 0, 0, longest - len(e))) for e in examples])
        mask = torch.stack([torch.arange(longest) < len(e) for e in examples])
        return {"x": padded, "mask": mask}

    def split(self, outputs: torch.Tensor, n: int) -> list[torch.Tensor]:
        return list(outputs)


# Counters and caches on self


class CounterAddedToInput(Kind):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x + 0.01 * self.calls)


class CounterForMetrics(Kind):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x)


class CacheOfLastShape(Kind):
    def set_up(self) -> None:
        self.rows = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) != self.rows:
            self.rows = len(x)
            self.ramp = torch.arange(float(len(x)))[:, None] * 0.0 + torch.ones(len(x), 1)
        return self.net(x) + self.ramp


class CacheOfEveryShape(Kind):
    def set_up(self) -> None:
        self.ramps: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = self.ramps.get(len(x))
        if ramp is None:
            ramp = self.ramps[len(x)] = torch.ones(len(x), 1)
        return self.net(x) + ramp


class RotaryTableThatGrows(Ragged):
    def set_up(self) -> None:
        self.length = 0

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x, mask = batch["x"], batch["mask"]
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.table = torch.cos(torch.arange(self.length)[:, None] / torch.arange(1.0, D + 1))
        y = self.net(x) * self.table[: x.shape[1]]
        return (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class KeysKeptOnSelf(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keys = self.net(x)
        queries = self.net(-x)
        return (queries * self.keys).sum(-1, keepdim=True) * x


class HiddenStateKeptBetweenCalls(Kind):
    def set_up(self) -> None:
        self.hidden = torch.zeros(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = torch.tanh(self.net(x).mean(0) + self.hidden)
        return x + self.hidden


class MemoryQueue(Kind):
    def set_up(self) -> None:
        self.queue: deque[torch.Tensor] = deque(maxlen=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.queue.append(x.mean(0))
        return self.net(x) + torch.stack(list(self.queue)).mean(0)


# Buffers


class ScratchWrittenInPlace(Kind):
    def set_up(self) -> None:
        self.scratch = torch.zeros(64, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scratch[: len(x)] = x
        y = self.net(x)
        return y + self.scratch[: len(x)]


class ScratchReturnedAsView(Kind):
    def set_up(self) -> None:
        self.out = torch.zeros(64, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.out[: len(x)] = self.net(x)
        return self.out[: len(x)]


class ScratchUnderLock(ScratchWrittenInPlace):
    def set_up(self) -> None:
        super().set_up()
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return super().forward(x).clone()


class ScratchPerThread(Kind):
    def set_up(self) -> None:
        self.local = threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.local, "scratch"):
            self.local.scratch = torch.zeros(64, D)
        self.local.scratch[: len(x)] = x
        y = self.net(x)
        return y + self.local.scratch[: len(x)]


class RingOfThree(Kind):
    def set_up(self) -> None:
        self.ring = [torch.zeros(64, D) for _ in range(3)]
        self.turn, self.lock = 0, threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.turn += 1
            buffer = self.ring[self.turn % 3]
        buffer[: len(x)] = x
        y = self.net(x)
        return y + buffer[: len(x)]


# What copies share

GLOBAL: dict[str, torch.Tensor] = {}
SEEN = {"largest": 0.0}


class GlobalDict(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        GLOBAL["x"] = x
        y = self.net(x)
        return y + GLOBAL["x"]


class GlobalMaximum(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN["largest"] = max(SEEN["largest"], float(x.abs().max()))
        return self.net(x) / SEEN["largest"]


class LargestSeenOnSelf(Kind):
    largest = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, float(x.abs().max()))
        return self.net(x) / self.largest


class ClassAttribute(Kind):
    shared: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).shared = x
        y = self.net(x)
        return y * type(self).shared


class ClosureKept(Kind):
    def set_up(self) -> None:
        self.step = make_step()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self.net, x)


def _closure() -> Any:
    kept: list[torch.Tensor] = []

    def step(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        y = net(x)
        return y + kept.pop()

    return step


_STEP = _closure()


def make_step() -> Any:
    """The same closure for all instances."""
    return _STEP


class LruCacheOfPureTable(Kind):
    @staticmethod
    @lru_cache(maxsize=8)
    def table(rows: int) -> torch.Tensor:
        return torch.ones(rows, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.table(len(x))


class LruCacheOfScratch(Kind):
    @staticmethod
    @lru_cache(maxsize=8)
    def scratch(rows: int) -> torch.Tensor:
        return torch.zeros(rows, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = self.scratch(len(x)).copy_(x)
        y = self.net(x)
        return y + scratch


# Random numbers


class DropoutLeftOn(Kind):
    def set_up(self) -> None:
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.net(x))


class FunctionalDropoutByDefault(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.net(x), 0.5)


class ManualSeedInForward(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        y = self.net(x)
        return y + torch.randn(D)


class OwnGenerator(Kind):
    def set_up(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + torch.randn(D, generator=self.generator)


class GeneratorMadeInTheCall(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + torch.randn(D, generator=torch.Generator().manual_seed(3))


class PythonsRandom(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + random.random()


# Modes


class BatchNormInTraining(Kind):
    def set_up(self) -> None:
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([self.net(x), self.net(-x)]))[: len(x)]


class BatchNormWithoutStatistics(Kind):
    def set_up(self) -> None:
        self.norm = nn.BatchNorm1d(D, track_running_stats=False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([self.net(x), self.net(-x)]))[: len(x)]


class BatchNormInEval(Kind):
    def set_up(self) -> None:
        self.norm = nn.BatchNorm1d(D).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.net(x))


class SpectralNormInTraining(Kind):
    def set_up(self) -> None:
        self.norm = torch.nn.utils.spectral_norm(nn.Linear(D, D)).train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class SpectralNormInEval(Kind):
    def set_up(self) -> None:
        self.norm = torch.nn.utils.spectral_norm(nn.Linear(D, D)).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class MovingAverageInForward(Kind):
    def set_up(self) -> None:
        self.average = torch.zeros(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average.mul_(0.99).add_(0.01 * x.mean(0))
        return self.net(x) - self.average


# Hooks and flags


class HookThatStores(Kind):
    def set_up(self) -> None:
        self.net.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.kept = output


class HookReadBack(HookThatStores):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.net(x)
        return self.kept * 2


class AttentionMapsKept(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weights = torch.softmax(self.net(x), -1)
        return torch.softmax(self.net(x), -1) * x


class AttentionMapsReadLater(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weights = torch.softmax(self.net(x), -1)
        y = self.net(x)
        return y * self.weights


class FlagDuringTheCall(Kind):
    scaled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scaled = bool(x[0, 0] > 0)
        y = self.net(x)
        return y * 2 if self.scaled else y


FLAG: contextvars.ContextVar[bool] = contextvars.ContextVar("FLAG", default=False)


class FlagInAContextVariable(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = FLAG.set(bool(x[0, 0] > 0))
        y = self.net(x)
        y = y * 2 if FLAG.get() else y
        FLAG.reset(token)
        return y


class DefaultDtypeSwitched(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)
        third = torch.ones(D) / 3
        torch.set_default_dtype(torch.float32)
        return self.net(x) * (third + torch.ones(D) / 3)


class SkipStackOnSelf(Kind):
    def set_up(self) -> None:
        self.skips: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.skips.append(x)
        y = self.net(x)
        return y + self.skips.pop()


class SkipStackLocal(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [x]
        y = self.net(x)
        return y + skips.pop()


# Lazy


class LazyLayer(Kind):
    def set_up(self) -> None:
        self.lazy = nn.LazyLinear(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1) if not self.lazy.in_features else None
        return self.lazy(x)


class LazyTableRightWhenRaced(Kind):
    table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, D)
        return self.net(x) + self.table


class LazyTablePublishedTooEarly(Kind):
    table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.zeros(D)
            self.table += torch.linspace(0, 1, D)
        return self.net(x) + self.table


# Batches


class QuantisedPerTensor(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 127
        return self.net((x / scale).round() * scale)


class QuantisedPerRow(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return self.net((x / scale).round() * scale)


class ExpertsWithCapacity(Kind):
    def set_up(self) -> None:
        self.router = nn.Linear(D, 2)
        self.experts = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    capacity = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            rows = rows[: self.capacity] if self.capacity else rows
            if len(rows):
                y[rows] = expert(x[rows])
        return y


class ExpertsWithoutCapacity(ExpertsWithCapacity):
    capacity = 0


class SoftmaxOverTheBatch(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.net(x), 0)


class SoftmaxOverFeatures(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.net(x), -1)


class StepsUntilAllConverge(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(200):
            y = 0.5 * y
            if bool((y.abs() < 0.01).all()):
                break
        return y


class AttentionWithMask(Ragged):
    masked = True

    def set_up(self) -> None:
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True).eval()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x, mask = batch["x"], batch["mask"]
        ignored = ~mask if self.masked else None
        y, _ = self.attention(x, x, x, key_padding_mask=ignored, need_weights=False)
        return y[:, 0]


class AttentionWithoutMask(AttentionWithMask):
    masked = False


class MeanPoolingWithMask(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"][..., None]
        return (self.net(batch["x"]) * mask).sum(1) / mask.sum(1)


class MeanPoolingWithoutMask(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(batch["x"]).mean(1)


class ConvolutionWithMask(Ragged):
    masked = True

    def set_up(self) -> None:
        self.first = nn.Conv1d(D, D, 3, padding=1)
        self.second = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"][:, None]
        y = self.first(batch["x"].transpose(1, 2))
        y = y * mask if self.masked else y
        return (self.second(y) * mask).sum(-1)


class ConvolutionWithoutMask(ConvolutionWithMask):
    masked = False


class RecurrentPacked(Ragged):
    def set_up(self) -> None:
        self.gru = nn.GRU(D, D, batch_first=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        lengths = batch["mask"].sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            batch["x"], lengths, batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][0]


class RecurrentPadded(Ragged):
    def set_up(self) -> None:
        self.gru = nn.GRU(D, D, batch_first=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.gru(batch["x"])[1][0]


# Clean ones


class CleanCnn(Kind):
    def set_up(self) -> None:
        self.cnn = nn.Sequential(
            nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (D - 2), 3)
        ).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cnn(x[:, None])


class CleanEncoder(Kind):
    def set_up(self) -> None:
        self.layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, None])[:, 0]


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():  # torch.jit.script is deprecated; what was scripted is still served
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module.eval())


class Scripted(Kind):
    def set_up(self) -> None:
        self.script = scripted(Stateless())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script(x)


class Stateless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.net(x)) + x


class Stateful(Stateless):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(1, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x
        y = self.net(x)
        return y + self.kept


class ScriptedWithState(Kind):
    def set_up(self) -> None:
        self.script = scripted(Stateful())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script(x)


RACES = {"thread_safe", "cold_start_safe"}
SHARED = {*RACES, "copy_safe"}
TRUTH: dict[type, set[str]] = {
    CounterAddedToInput: {*RACES, "order_independent"},
    CounterForMetrics: set(),
    CacheOfLastShape: RACES,
    CacheOfEveryShape: set(),
    RotaryTableThatGrows: {"cold_start_safe"},
    KeysKeptOnSelf: RACES,
    HiddenStateKeptBetweenCalls: {*RACES, "order_independent", "batch_invariant"},
    MemoryQueue: {*RACES, "order_independent", "batch_invariant"},
    ScratchWrittenInPlace: RACES,
    ScratchReturnedAsView: RACES,
    ScratchUnderLock: set(),
    ScratchPerThread: set(),
    RingOfThree: RACES,
    GlobalDict: SHARED,
    GlobalMaximum: {*SHARED, "order_independent", "batch_invariant"},
    LargestSeenOnSelf: {*RACES, "order_independent", "batch_invariant"},
    ClassAttribute: SHARED,
    ClosureKept: SHARED,
    LruCacheOfPureTable: set(),
    LruCacheOfScratch: SHARED,
    DropoutLeftOn: {"deterministic", "eval_mode"},
    FunctionalDropoutByDefault: {"deterministic", "eval_mode"},
    ManualSeedInForward: SHARED,
    OwnGenerator: {*RACES, "deterministic", "order_independent"},
    GeneratorMadeInTheCall: set(),
    PythonsRandom: {"deterministic"},
    BatchNormInTraining: {"batch_invariant", "eval_mode"},
    BatchNormWithoutStatistics: {"batch_invariant", "eval_mode"},
    BatchNormInEval: set(),
    SpectralNormInTraining: {*RACES, "order_independent", "eval_mode"},
    SpectralNormInEval: set(),
    MovingAverageInForward: {*RACES, "order_independent", "batch_invariant"},
    HookThatStores: set(),
    HookReadBack: RACES,
    AttentionMapsKept: set(),
    AttentionMapsReadLater: RACES,
    FlagDuringTheCall: {*RACES, "batch_invariant"},
    FlagInAContextVariable: {"batch_invariant"},
    DefaultDtypeSwitched: SHARED,
    SkipStackOnSelf: RACES,
    SkipStackLocal: set(),
    LazyLayer: {"cold_start_safe"},
    LazyTableRightWhenRaced: set(),
    LazyTablePublishedTooEarly: {"cold_start_safe"},
    QuantisedPerTensor: {"batch_invariant"},
    QuantisedPerRow: set(),
    ExpertsWithCapacity: {"batch_invariant"},
    ExpertsWithoutCapacity: set(),
    SoftmaxOverTheBatch: {"batch_invariant"},
    SoftmaxOverFeatures: set(),
    StepsUntilAllConverge: {"batch_invariant"},
    AttentionWithMask: set(),
    AttentionWithoutMask: {"padding_invariant"},
    MeanPoolingWithMask: set(),
    MeanPoolingWithoutMask: {"padding_invariant"},
    ConvolutionWithMask: set(),
    ConvolutionWithoutMask: {"padding_invariant"},
    RecurrentPacked: set(),
    RecurrentPadded: {"padding_invariant"},
    CleanCnn: set(),
    CleanEncoder: set(),
    Scripted: set(),
    ScriptedWithState: RACES,
}


class Fails(Kind):
    """Does not load."""

    def load(self, device: str) -> None:
        raise ValueError("weights are missing")
