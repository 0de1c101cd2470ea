"""More small models, written to mislead the audit: state in odd places, locks that hold too little, batches
that matter only sometimes; and safe twins that look guilty. `TRUTH` as in kinds.py.
"""

import contextvars
import functools
import itertools
import os
import queue
import random
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.audit.kinds import RACES, SHARED, D, Kind, Ragged, Stateless, numbers

# State in odd places


class CounterModuloN(Kind):
    n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n = (self.n + 1) % 4
        return self.net(x) + 0.01 * self.n


class CounterKeptOnTheClass(Kind):
    n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).n += 1
        return self.net(x) + 0.01 * (self.n % 5)


class StateInADefaultArgument(Kind):
    def forward(self, x: torch.Tensor, seen: list[float] = []) -> torch.Tensor:  # noqa: B006
        seen.append(1.0)
        return self.net(x) + 0.01 * len(seen)


class ScratchInADefaultArgument(Kind):
    def forward(
        self,
        x: torch.Tensor,
        scratch: torch.Tensor = torch.zeros(64, D),  # noqa: B008
    ) -> torch.Tensor:
        scratch[: len(x)] = x
        y = self.net(x)
        return y + scratch[: len(x)]


class CountFromItertools(Kind):
    def set_up(self) -> None:
        self.numbers = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + 0.01 * next(self.numbers)


class GeneratorObjectKept(Kind):
    def set_up(self) -> None:
        self.offsets = self.make()

    def make(self) -> Any:
        while True:
            yield torch.zeros(D)
            yield torch.ones(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + next(self.offsets)


class TableAsCachedProperty(Kind):
    @functools.cached_property
    def table(self) -> torch.Tensor:
        return torch.linspace(0, 1, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.table


class PureWeakCache(Kind):
    def set_up(self) -> None:
        self.tables: Any = weakref.WeakValueDictionary()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.tables.get(len(x))
        if table is None:
            table = self.tables[len(x)] = torch.ones(len(x), 1)
        return self.net(x) + table


class IdKeyedCache(Kind):
    def set_up(self) -> None:
        self.known: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if id(self) not in self.known or len(self.known[id(self)]) != len(x):
            self.known[id(self)] = self.net(x)
        return self.known[id(self)]


class RunningBest(Kind):
    best: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.best is None or bool(x.sum() > self.best.sum()):
            self.best = x.mean(0)
        return self.net(x) + self.best


class OneWayFlag(Kind):
    has_seen_large = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.abs().max()) > 50:
            self.has_seen_large = True
        return self.net(x) * (0.5 if self.has_seen_large else 1.0)


class CounterPerThread(Kind):
    def set_up(self) -> None:
        self.local = threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.local.n = getattr(self.local, "n", 0) + 1
        return self.net(x) + 0.01 * self.local.n


class ListInAContextVariable(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _STACK.get().append(x)
        y = self.net(x)
        return y + _STACK.get().pop()


_STACK: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("_STACK", default=[])  # noqa: B039


class NetworkSharedByInstances(Kind):
    networks: dict[str, nn.Module] = {}

    def set_up(self) -> None:
        self.core = self.networks.setdefault("core", nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.core.kept = x
        y = self.core(x)
        return y + self.core.kept


class HiddenOfAnLstmKept(Kind):
    state: Any = None

    def set_up(self) -> None:
        self.lstm = nn.LSTM(D, D, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state is not None and self.state[0].shape[1] != len(x):
            self.state = None
        y, self.state = self.lstm(x[:, None], self.state)
        return y[:, 0]


class KeysResetEachCall(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache: list[torch.Tensor] = []
        for _ in range(2):
            self.cache.append(self.net(x))
        return torch.stack(self.cache).sum(0)


class PostprocessReadsSelf(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = float(x.mean())
        return self.net(x)

    def postprocess(self, output: torch.Tensor) -> Any:
        return [value + self.mean for value in output.tolist()]


# Buffers, locks, queues


class RingOfTwo(Kind):
    def set_up(self) -> None:
        self.ring = [torch.zeros(64, D) for _ in range(2)]
        self.turn = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffer = self.ring[next(self.turn) % 2]
        buffer[: len(x)] = x
        y = self.net(x)
        return y + buffer[: len(x)]


class LockAroundHalf(Kind):
    def set_up(self) -> None:
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.x = x
        return self.net(x) + self.x


class RingOfEight(RingOfTwo):
    def set_up(self) -> None:
        self.ring = [torch.zeros(64, D) for _ in range(8)]
        self.turn = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffer = self.ring[next(self.turn) % 8]
        buffer[: len(x)] = x
        y = self.net(x)
        return y + buffer[: len(x)]


class RaceInOneLine(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x; return self.net(self.x)  # fmt: skip  # noqa: E702


class EveryHundredthCall(Kind):
    n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return self.net(x) * (1.5 if self.n % 100 == 0 else 1.0)


class LockGivenBackTooEarly(Kind):
    def set_up(self) -> None:
        self.lock, self.out = threading.Lock(), torch.zeros(64, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.out[: len(x)] = self.net(x)
        return self.out[: len(x)]


class ReentrantLockAroundAll(Kind):
    def set_up(self) -> None:
        self.lock = threading.RLock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.x = x
            return self.again()

    def again(self) -> torch.Tensor:
        with self.lock:
            return self.net(self.x)


class TwoLocksInAnyOrder(Kind):
    def set_up(self) -> None:
        self.locks = [threading.Lock(), threading.Lock()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = int(x[0, 0] > 0)
        with self.locks[first]:
            y = self.net(x)
            with self.locks[1 - first]:
                return y * 2


class BusyFlagThatRaises(Kind):
    is_busy = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_busy:
            raise RuntimeError("one at a time")
        self.is_busy = True
        y = self.net(x)
        self.is_busy = False
        return y


class DoubleCheckedRight(Kind):
    table: Any = None

    def set_up(self) -> None:
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            with self.lock:
                if self.table is None:
                    table = torch.zeros(D)
                    table += torch.linspace(0, 1, D)
                    self.table = table
        return self.net(x) + self.table


class DoubleCheckedWrong(DoubleCheckedRight):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            with self.lock:
                if self.table is None:
                    self.table = torch.zeros(D)
                    self.table += torch.linspace(0, 1, D)
        return self.net(x) + self.table


class CopyOnWrite(Kind):
    def set_up(self) -> None:
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tables = self.tables
        if len(x) not in tables:
            tables = {**tables, len(x): torch.ones(len(x), 1)}
            self.tables = tables
        return self.net(x) + tables[len(x)]


class CopyOnWriteReadBack(CopyOnWrite):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) not in self.tables:
            self.tables = {**self.tables, len(x): torch.ones(len(x), 1)}
        return self.net(x) + self.tables[len(x)]


class TableOfEachLengthPublishedTooEarly(Kind):
    """Warm-up makes the tables of the examples' lengths; a new one is a first call again."""

    def set_up(self) -> None:
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) not in self.tables:
            self.tables[len(x)] = torch.zeros(len(x), 1)
            self.tables[len(x)] += 1.0
        return self.net(x) + self.tables[len(x)]


class LruOfTwoReadBack(Kind):
    def set_up(self) -> None:
        self.known: OrderedDict[int, torch.Tensor] = OrderedDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) not in self.known:
            self.known[len(x)] = torch.ones(len(x), 1)
            if len(self.known) > 1:
                self.known.popitem(last=False)
        y = self.net(x)
        return y + self.known[len(x)]


class PoolOfBuffersInAQueue(Kind):
    def set_up(self) -> None:
        self.free: Any = queue.SimpleQueue()
        for _ in range(2):
            self.free.put(torch.zeros(64, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffer = self.free.get()
        buffer[: len(x)] = x
        y = self.net(x) + buffer[: len(x)]
        self.free.put(buffer)
        return y


class ThroughAQueue(Kind):
    def set_up(self) -> None:
        self.queue: Any = queue.SimpleQueue()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.queue.put(x)
        y = self.net(x)
        return y + self.queue.get()


class ThreadPoolInside(Kind):
    def set_up(self) -> None:
        self.pool = ThreadPoolExecutor(2)
        self.net.requires_grad_(False)  # inference mode holds for the calling thread alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.pool.map(self.net, [x, -x]))  # type: ignore[return-value]


class ThreadPoolThatWritesSelf(ThreadPoolInside):
    def part(self, number: int) -> None:
        self.parts[number] = self.net(self.x * (number + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x, self.parts = x, [None, None]
        list(self.pool.map(self.part, [0, 1]))
        return self.parts[0] + self.parts[1]


class ParameterScaledAndUndone(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.net.weight.mul_(2)
        y = self.net(x)
        self.net.weight.div_(2)
        return y


class ConstantReturnedAsView(Kind):
    def set_up(self) -> None:
        self.constant = torch.linspace(0, 1, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.constant.expand(len(x), D)


class InputReturned(Kind):
    def forward(self, x: torch.Tensor) -> Any:
        return {"same": x, "net": self.net(x)}


# The process


class GradModeToggled(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad(), torch.no_grad():
            return self.net(x)


class ThreadCountSet(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1)
        return self.net(x)


class EnvironmentVariable(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os.environ["BRIMFUL_KIND"] = "2" if bool(x[0, 0] > 0) else "1"
        y = self.net(x)
        return y * float(os.environ["BRIMFUL_KIND"])


class BackendFlag(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.backends.cudnn.benchmark = bool(x.sum() > 0)
        y = self.net(x)
        return y * 2 if torch.backends.cudnn.benchmark else y


class WarningsCaught(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.net(x)


class AutocastInside(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.tanh(self.net(x)).float()


class NumpysRandom(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + float(np.random.rand())


class RareChoice(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (2.0 if random.random() < 0.3 else 1.0)


class PythonSeededInForward(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random.seed(3)
        y = self.net(x)
        return y + random.random()


class ForkedGenerator(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            y = self.net(x)
            return y + torch.randn(D)


class GeneratorSeededEachCall(Kind):
    def set_up(self) -> None:
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.generator.manual_seed(3)
        y = self.net(x)
        return y + torch.randn(D, generator=self.generator)


class SeededByTheClock(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
        return self.net(x) + torch.randn(D, generator=generator)


class SeededByTheBatch(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(x.abs().sum() * 1000))
        return self.net(x) + torch.randn(D, generator=generator)


# Batches


class InstanceNorm(Kind):
    def set_up(self) -> None:
        self.norm = nn.InstanceNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.net(x).reshape(len(x), 2, D // 2)).flatten(1)


class GroupNorm(Kind):
    def set_up(self) -> None:
        self.norm = nn.GroupNorm(2, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.net(x))


class NormOverAll(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return (y - y.mean()) / (y.std() + 1e-5)


class TopKOverTheBatch(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        least = y.flatten().topk(y.numel() // 2).values[-1]
        return y * (y >= least)


class CumulativeOverTheBatch(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).cumsum(0)


class NeighbourInTheBatch(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + 0.1 * x.roll(1, 0)


class OneAtATimeIsSpecial(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (1.01 if len(x) == 1 else 1.0)


class LargeBatchesAreSpecial(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (1.01 if len(x) > 8 else 1.0)


class ClampedWhereAnyIsLarge(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y.clamp(-0.2, 0.2) if bool((x.abs() > 50).any()) else y


class DuplicatesDropped(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, where, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
        return (self.net(rows) / counts[:, None])[where]


class DuplicatesComputedOnce(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, where = torch.unique(x, dim=0, return_inverse=True)
        return self.net(rows)[where]


class LastOfTheBatchWins(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        y[:-1] += 0.0 * y[:-1]
        y[-1] = y[-1] * 1.5
        return y


class SortedByLengthRightly(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x, mask = batch["x"], batch["mask"]
        order = mask.sum(1).argsort(descending=True, stable=True)
        y = (self.net(x[order]) * mask[order][..., None]).sum(1)
        return y[self.back(order)]

    def back(self, order: torch.Tensor) -> torch.Tensor:
        return order.argsort()


class SortedByLengthWrongly(SortedByLengthRightly):
    def back(self, order: torch.Tensor) -> torch.Tensor:
        return order


class DroppedBeyondAQuarter(Ragged):
    """Padding beyond the first row's length is cut: rows that are longer lose their ends."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        first = int(batch["mask"][0].sum())
        x, mask = batch["x"][:, :first], batch["mask"][:, :first, None]
        return (self.net(x) * mask).sum(1)


class LengthOfTheLongestAsFeature(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"][..., None]
        return (self.net(batch["x"]) * mask).sum(1) / batch["x"].shape[1]


class PositionsFromTheEnd(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x, mask = batch["x"], batch["mask"][..., None]
        places = torch.arange(x.shape[1], 0, -1.0)[None, :, None]
        return (self.net(x) * mask * places).sum(1)


class MaskedMaximum(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        y = self.net(batch["x"]).masked_fill(~batch["mask"][..., None], float("-inf"))
        return y.amax(1)


class MaximumOverPads(Ragged):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(batch["x"]).amax(1)


# Torch's own


class FxTraced(Kind):
    def set_up(self) -> None:
        self.graph = torch.fx.symbolic_trace(Stateless().eval())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.graph(x)


class QuantisedConvolution(Kind):
    """QNNPACK's, whose threads raced once (pytorch 58055); a lock of torch's own holds them apart since."""

    def set_up(self) -> None:
        torch.backends.quantized.engine = "qnnpack"
        weight = torch.quantize_per_tensor(torch.randn(4, 1, 1, 3), 0.02, 0, torch.qint8)
        self.packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 1], [1, 1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = torch.quantize_per_tensor(x[:, None, None, :], 0.05, 64, torch.quint8)
        return torch.ops.quantized.conv2d(image, self.packed, 0.05, 64).dequantize().flatten(1)


class WeightNorm(Kind):
    def set_up(self) -> None:
        self.net = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, D)).eval()


class SpectralParametrizationInTraining(Kind):
    def set_up(self) -> None:
        self.net = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)).train()


class SpectralParametrizationInEval(Kind):
    def set_up(self) -> None:
        self.net = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)).eval()


class QuantisedDynamically(Kind):
    def set_up(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(D, D)).eval())


class DropoutOfNothing(Kind):
    def set_up(self) -> None:
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.net(x))


class DropoutOfTheAttentionCall(Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.net(x)[:, None, :, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, 0, :, 0]


class CompiledEagerly(Kind):
    def set_up(self) -> None:
        self.compiled = torch.compile(Stateless().eval(), backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compiled(x)


def plain_module() -> nn.Module:
    """A factory."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 3)).eval()


def forgotten_eval() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.Linear(D, 3))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    model.examples = lambda: [
        {"input_ids": torch.tensor(ids)} for ids in ([3, 4, 5], [6, 7, 8], [9, 1, 2, 3])
    ]
    return model


def examples() -> list[torch.Tensor]:
    return [torch.tensor(numbers(seed)) for seed in (1, 2, 3)]


KEPT = {*RACES, "order_independent"}
TRUTH: dict[Any, set[str]] = {
    CounterModuloN: KEPT,
    CounterKeptOnTheClass: {*KEPT, "copy_safe"},
    StateInADefaultArgument: {*KEPT, "copy_safe"},
    ScratchInADefaultArgument: SHARED,
    CountFromItertools: KEPT,
    GeneratorObjectKept: KEPT,
    TableAsCachedProperty: set(),
    PureWeakCache: set(),
    IdKeyedCache: KEPT,
    RunningBest: {*KEPT, "batch_invariant"},
    OneWayFlag: {*KEPT, "batch_invariant"},
    CounterPerThread: KEPT,
    ListInAContextVariable: SHARED,
    NetworkSharedByInstances: SHARED,
    HiddenOfAnLstmKept: KEPT,
    KeysResetEachCall: RACES,
    PostprocessReadsSelf: {*RACES, "batch_invariant"},
    RingOfTwo: RACES,
    RingOfEight: RACES,
    RaceInOneLine: RACES,
    EveryHundredthCall: KEPT,
    LockAroundHalf: RACES,
    LockGivenBackTooEarly: RACES,
    ReentrantLockAroundAll: set(),
    TwoLocksInAnyOrder: RACES,
    BusyFlagThatRaises: RACES,
    DoubleCheckedRight: set(),
    DoubleCheckedWrong: {"cold_start_safe"},
    CopyOnWrite: set(),
    CopyOnWriteReadBack: {"cold_start_safe"},
    TableOfEachLengthPublishedTooEarly: {"cold_start_safe"},
    LruOfTwoReadBack: RACES,
    PoolOfBuffersInAQueue: set(),
    ThroughAQueue: RACES,
    ThreadPoolInside: set(),
    ThreadPoolThatWritesSelf: RACES,
    ParameterScaledAndUndone: RACES,
    ConstantReturnedAsView: set(),
    InputReturned: set(),
    GradModeToggled: set(),
    ThreadCountSet: set(),
    EnvironmentVariable: {*SHARED, "batch_invariant"},
    BackendFlag: {*SHARED, "batch_invariant"},
    WarningsCaught: set(),
    AutocastInside: set(),
    NumpysRandom: {"deterministic"},
    RareChoice: {"deterministic"},
    PythonSeededInForward: SHARED,
    ForkedGenerator: SHARED,
    GeneratorSeededEachCall: RACES,
    SeededByTheClock: {"deterministic"},
    SeededByTheBatch: {"batch_invariant"},
    InstanceNorm: set(),
    GroupNorm: set(),
    NormOverAll: {"batch_invariant"},
    TopKOverTheBatch: {"batch_invariant"},
    CumulativeOverTheBatch: {"batch_invariant"},
    NeighbourInTheBatch: {"batch_invariant"},
    OneAtATimeIsSpecial: {"batch_invariant"},
    LargeBatchesAreSpecial: {"batch_invariant"},
    ClampedWhereAnyIsLarge: {"batch_invariant"},
    DuplicatesDropped: {"batch_invariant"},
    DuplicatesComputedOnce: set(),
    LastOfTheBatchWins: {"batch_invariant"},
    SortedByLengthRightly: set(),
    SortedByLengthWrongly: {"batch_invariant"},
    DroppedBeyondAQuarter: {"batch_invariant"},
    LengthOfTheLongestAsFeature: {"padding_invariant"},
    PositionsFromTheEnd: {"padding_invariant"},
    MaskedMaximum: set(),
    MaximumOverPads: {"padding_invariant"},
    FxTraced: set(),
    WeightNorm: set(),
    SpectralParametrizationInTraining: {*KEPT, "eval_mode"},
    SpectralParametrizationInEval: set(),
    QuantisedDynamically: {"batch_invariant"},
    DropoutOfNothing: set(),
    DropoutOfTheAttentionCall: {"deterministic", "eval_mode"},
    CompiledEagerly: set(),
    QuantisedConvolution: set(),
    plain_module: set(),
    forgotten_eval: {"deterministic", "eval_mode"},
    bert: set(),
}
