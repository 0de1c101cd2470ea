"""The states of all running sequences, stacked: a step gathers its rows and scatters them back.

Owns: which sequence has which row, and the stacks' memory: at most four times what is in use, above
MIN_ROWS. Must not know: what a state means, user's classes, the scheduler. Model thread only.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deployments.core.errors import ModelBroken

MIN_ROWS = 8
"""A stack's least capacity: growing from 1 would copy the first states three times for nothing."""

State = Mapping[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class Row:
    """One sequence's place: row `index` of every tensor of its stack. It moves when others leave."""

    stack: "Stack"
    index: int
    key: Hashable


class Stack:
    """States of one signature (names, shapes, dtypes): a tensor [capacity, ...] for each name.

    Rows [0, n) are in use, [n, capacity) are free: the last one moves into the place of one that leaves.
    """

    def __init__(self, like: State, device: str, max_rows: int) -> None:
        self._max_rows = max_rows
        self._rows: list[Row] = []
        capacity = min(MIN_ROWS, max_rows)
        self._tensors = {
            name: torch.empty((capacity, *tensor.shape), dtype=tensor.dtype, device=device)
            for name, tensor in like.items()
        }
        self._capacity = capacity
        self.signature = signature_of(like)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def add(self, state: State, key: Hashable) -> Row:
        """Raises RuntimeError beyond `max_rows` sequences."""
        index = len(self._rows)
        if index == self._capacity:
            if index == self._max_rows:
                raise RuntimeError(f"no free row: {index} sequences run, the most that load was told")
            self._resize(min(2 * self._capacity, self._max_rows))
        for name, tensor in self._tensors.items():
            tensor[index].copy_(state[name])
        self._rows.append(Row(self, index, key))
        return self._rows[index]

    def remove(self, row: Row) -> None:
        last = self._rows.pop()
        if last is not row:
            for tensor in self._tensors.values():
                tensor[row.index].copy_(tensor[last.index])
            self._rows[row.index], last.index = last, row.index
        row.index = -1
        if self._capacity > MIN_ROWS and 4 * len(self._rows) <= self._capacity:
            self._resize(self._capacity // 2)

    def _resize(self, capacity: int) -> None:
        used = len(self._rows)
        for name, tensor in self._tensors.items():
            self._tensors[name] = tensor.new_empty((capacity, *tensor.shape[1:]))
            self._tensors[name][:used].copy_(tensor[:used])
        self._capacity = capacity

    def read(self, row: Row) -> dict[str, torch.Tensor]:
        """A copy of one sequence's state."""
        return {name: tensor[row.index].clone() for name, tensor in self._tensors.items()}

    def index(self, rows: Sequence[Row]) -> torch.Tensor:
        """[B] int64, on the stack's device: where these rows are now."""
        device = next((tensor.device for tensor in self._tensors.values()), None)
        return torch.tensor([row.index for row in rows], device=device)

    def gather(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies [B, ...] of the rows: a step that fails half-way has spoilt nothing."""
        return {name: tensor.index_select(0, index) for name, tensor in self._tensors.items()}

    def scatter(self, index: torch.Tensor, states: State) -> None:
        """Write [B, ...] back to the rows."""
        for name, tensor in self._tensors.items():
            tensor.index_copy_(0, index, states[name])


def signature_of(state: State) -> Hashable:
    """Equal for states that can be stacked; independent of the dict's order."""
    return tuple(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in state.items()))


class StateSlots:
    """The stacks of a model; a stack lives as long as a sequence is in it."""

    def __init__(self, device: str, slots: int) -> None:
        self._device, self._slots = device, slots
        self._stacks: dict[Hashable, Stack] = {}
        self._keys: dict[Hashable, set[Row]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._stacks.values()))

    @property
    def bytes(self) -> int:
        """Of the stacks' tensors."""
        return sum(stack.bytes for stack in self._stacks.values())

    def add(self, key: Hashable, state: State) -> Row:
        """Store a sequence's first state. ModelBroken where sequences of its key have other states."""
        signature = signature_of(state)
        mates = self._keys.get(key)
        if mates and next(iter(mates)).stack.signature != signature:
            raise ModelBroken(
                "begin gave a state whose names, shapes or dtypes differ from those of a running sequence "
                "of the same key: declare key(request), so that only equal ones share a step"
            )
        stack = self._stacks.get(signature)
        if stack is None:
            stack = Stack(state, self._device, self._slots)
        row = stack.add(state, key)
        self._stacks[signature] = stack
        self._keys.setdefault(key, set()).add(row)
        return row

    def remove(self, row: Row) -> None:
        """Free the row; its last state is gone."""
        row.stack.remove(row)
        if not row.stack:
            del self._stacks[row.stack.signature]
        mates = self._keys[row.key]
        mates.remove(row)
        if not mates:
            del self._keys[row.key]
