"""Where the works of a step lie in its ragged matrix: first those of one token, by slot, then the chunks.

Owns: that order and the index tensors that all layers share, made once a step. Must not know:
networks, memory.
"""

from collections.abc import Sequence as Values
from dataclasses import dataclass

import torch

from deployments.engine.sequence import Work


@dataclass(frozen=True, slots=True)
class Layout:
    """works: in the matrix's order, the first `singles` of one row each, by slot; places: where each
    stands in the step. firsts: its first row. rows: of all works together, T."""

    works: list[Work]
    places: list[int]
    singles: int
    firsts: list[int]
    rows: int

    def ids(self) -> list[int]:
        """Token ids of all rows [T]."""
        out: list[int] = []
        for work in self.works:
            out += work.sequence.tokens[work.start : work.start + work.count]
        return out

    def positions(self) -> torch.Tensor:
        """Of each row in its sequence: int64 [T]."""
        out = [work.start for work in self.works[: self.singles]]
        for work in self.works[self.singles :]:
            out += range(work.start, work.start + work.count)
        return torch.tensor(out)

    def slots(self) -> torch.Tensor:
        """Of each row: int64 [T]."""
        return torch.tensor([work.sequence.slot for work in self.works for _ in range(work.count)])

    def last_rows(self) -> list[int]:
        """The rows after which a token is sampled."""
        pairs = zip(self.works, self.firsts, strict=True)
        return [first + work.count - 1 for work, first in pairs if work.is_last]


def arrange(works: Values[Work]) -> Layout:
    """The layout of a step's works, at least one."""
    places = sorted(range(len(works)), key=lambda i: (works[i].count > 1, works[i].sequence.slot))
    ordered = [works[i] for i in places]
    firsts: list[int] = []
    rows = 0
    for work in ordered:
        firsts.append(rows)
        rows += work.count
    singles = sum(work.count == 1 for work in ordered)
    return Layout(ordered, places, singles, firsts, rows)
