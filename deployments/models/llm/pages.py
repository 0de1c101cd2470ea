"""Keys and values on a GPU: pages that sequences share in place, and attention over block tables.

Owns: the pages of all layers and the tables of a step. Must not know: layers' weights, scheduling.
Source: Kwon et al., "PagedAttention" (SOSP 2023); torch.nn.attention.varlen.

    pages  [layers, 2, blocks + 1, PAGE, kv_heads, D]    the last is scratch, for what nobody reads
"""

from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from deployments.engine.sequence import Copy, Sequence, Work
from deployments.models.llm.config import DecoderShape
from deployments.models.llm.layout import Layout, arrange
from deployments.models.varlen import varlen_attention

PAGE = 256
"""Tokens; FlashAttention 2 takes multiples of 256 alone, later ones take those too."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the kernels of one step read, on the device. N works, T rows.

    where: int64 [T], each row's place among all tokens of the pages. starts: int32 [N + 1], rows of
    each work. used: int32 [N], tokens of each with this step's. pages: int32 [N, most pages of one].
    """

    where: torch.Tensor
    starts: torch.Tensor
    used: torch.Tensor
    pages: torch.Tensor
    longest_q: int
    longest_k: int


class Attend(Protocol):
    """Reads the pages of one layer: queries [T, heads, D] -> mixed [T, heads, D]."""

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor: ...


class PageStore:
    """Pages of `blocks` blocks in `device`'s memory. Nothing is copied to share a prefix."""

    def __init__(self, shape: DecoderShape, *, blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.blocks = shape, device, blocks
        size = (shape.layers, 2, blocks + 1, PAGE, shape.kv_heads, shape.head_dim)
        self._pages = torch.zeros(size, device=device, dtype=dtype)
        self.has_kernel = has_paged_kernel(device, dtype, shape)

    def free(self, slots: Values[int]) -> None:
        """Pages belong to blocks, not to slots."""

    def load(self, copies: Values[Copy]) -> None:
        assert not copies, "pages are shared in place"

    def save(self, copies: Values[Copy]) -> None:
        assert not copies, "pages are shared in place"

    def attention(self, layout: Layout, positions: torch.Tensor) -> "PageAttention":
        """For the rows of one step."""
        if self.has_kernel:
            return self.paged(self.tables(layout))
        tables = self.tables(layout)
        return PageAttention(self._pages, self.shape, tables.where, _Gathered(layout, tables))

    def paged(self, tables: Tables) -> "PageAttention":
        """With the kernel, from tables that may be rewritten in place between steps."""
        return PageAttention(self._pages, self.shape, tables.where, _Kernel(tables))

    def tables(self, layout: Layout) -> Tables:
        """Of one step, on the device."""
        return make_tables(layout, scratch=self.blocks, device=self.device)


class PageAttention:
    """Attention of one step; the network's Attention."""

    def __init__(self, pages: torch.Tensor, shape: DecoderShape, where: torch.Tensor, attend: Attend) -> None:
        self._pages, self._shape, self._where, self._attend = pages, shape, where, attend

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        shape = self._shape
        queries, keys, values = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        for pages, own in zip(self._pages[layer], (keys, values), strict=True):
            pages.view(-1, shape.kv_heads, shape.head_dim).index_copy_(0, self._where, own)
        return self._attend(queries, *self._pages[layer]).reshape(len(heads), -1)


class _Kernel:
    """PyTorch's variable-length attention over block tables: all works in one launch."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._attend = varlen_attention()

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        tables = self._tables
        assert self._attend is not None  # has_paged_kernel
        mixed = self._attend(
            queries,
            keys,
            values,
            tables.starts,
            None,
            tables.longest_q,
            tables.longest_k,
            window_size=(-1, 0),  # causal; a work's rows are the last ones of its sequence
            enable_gqa=True,
            seqused_k=tables.used,
            block_table=tables.pages,
        )
        assert isinstance(mixed, torch.Tensor)
        return mixed


class _Gathered:
    """The same in plain PyTorch, for any device and dtype: each work's pages are gathered first."""

    def __init__(self, layout: Layout, tables: Tables) -> None:
        device = tables.where.device
        self._works = [
            (first, work.count, tables.pages[i], work.start + work.count, _causal(work, device))
            for i, (first, work) in enumerate(zip(layout.firsts, layout.works, strict=True))
        ]

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        parts = []
        for first, count, table, used, sees in self._works:
            own, theirs = (pages[table].flatten(0, 1)[:used].transpose(0, 1) for pages in (keys, values))
            mine = queries[first : first + count].transpose(0, 1)  # [heads, n, D]
            mixed = F.scaled_dot_product_attention(
                mine[None], own[None], theirs[None], attn_mask=sees, enable_gqa=True
            )
            parts.append(mixed[0].transpose(0, 1))
        return torch.cat(parts)


def make_tables(layout: Layout, *, scratch: int, device: torch.device) -> Tables:
    """Of one step. scratch: the page that fills the tables of shorter sequences."""
    works = layout.works
    most = max(-(-(work.start + work.count) // PAGE) for work in works)
    pages = [[*work.blocks, *([scratch] * most)][:most] for work in works]
    used = [work.start + work.count for work in works]
    starts = [*layout.firsts, layout.rows]
    return Tables(
        where=torch.tensor([place for work in works for place in _places(work)], device=device),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        used=torch.tensor(used, dtype=torch.int32, device=device),
        pages=torch.tensor(pages, dtype=torch.int32, device=device),
        longest_q=max(work.count for work in works),
        longest_k=max(used),
    )


def has_paged_kernel(device: torch.device, dtype: torch.dtype, shape: DecoderShape) -> bool:
    """Whether this PyTorch on this GPU attends over block tables: tried on two pages, as what it takes
    depends on the build (FlashAttention 2, 3 or 4) and not on a version number."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or varlen_attention() is None:
        return False
    count = PAGE + 3
    layout = arrange([Work(Sequence(slot=0), 0, count, is_last=True, blocks=[1, 0])])
    tables = make_tables(layout, scratch=2, device=device)
    queries = torch.randn(count, shape.heads, shape.head_dim, device=device, dtype=dtype)
    pages = torch.randn(2, 3, PAGE, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
    try:
        found = _Kernel(tables)(queries, *pages)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    expected = _Gathered(layout, tables)(queries, *pages)
    return bool((found - expected).abs().max() < 0.05)


def _places(work: Work) -> list[int]:
    """Where the rows of a work lie among all tokens of the pages."""
    units = range(work.start, work.start + work.count)
    return [work.blocks[unit // PAGE] * PAGE + unit % PAGE for unit in units]


def _causal(work: Work, device: torch.device) -> torch.Tensor | None:
    """Which tokens each row of a work sees, bool [n, tokens]; None: all of them."""
    if work.count == 1:
        return None
    end = work.start + work.count
    return torch.ones(work.count, end, dtype=torch.bool, device=device).tril(work.start)
