"""Keys and values on a CPU: a row of the whole context for each slot, and the prefix cache beside them.

Owns: that memory, committed only where written and given back when a slot is freed, and attention over
it. Must not know: layers' weights, scheduling. Source: DESIGN decision 9; mmap(2), madvise(2).

    rows   [slots, layers, 2, kv_heads, capacity, D]    a slot is one contiguous range of pages
    cache  [blocks, layers, 2, kv_heads, 16, D]
"""

import math
import mmap
from collections.abc import Sequence as Values

import torch
import torch.nn.functional as F

from deployments.engine.sequence import Copy, Work
from deployments.models.llm.attend import RowKernel, SingleTokens
from deployments.models.llm.config import DecoderShape
from deployments.models.llm.layout import Layout
from deployments.models.llm.spans import Span, cut

BLOCK_UNITS = 16
"""16 tokens of one head of 64 float32 are just one page of memory."""

_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


class LazyMemory:
    """Zeros that take memory only from their first write on. bytes: a multiple of the page size."""

    def __init__(self, size_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, size_bytes, flags=flags)
        try:
            # A huge page would commit 2 MiB, that is thousands of tokens of a head, for the first one.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:  # a kernel without huge pages
            pass
        self.floats = torch.frombuffer(self._map, dtype=torch.float32)

    def clear(self, start: int, size_bytes: int) -> None:
        """Zeros again, their memory given back. Both multiples of the page size."""
        self._map.madvise(mmap.MADV_DONTNEED, start, size_bytes)


class RowStore:
    """Rows of `slots` sequences and a cache of `blocks` blocks, float32.

    is_fused: single tokens attend by a kernel of our own (attend.py), built where it is wanted.
    """

    def __init__(self, shape: DecoderShape, *, slots: int, blocks: int, is_fused: bool = False) -> None:
        self._shape = shape
        self._capacity = _capacity(shape)
        per_slot = (shape.layers, 2, shape.kv_heads, self._capacity, shape.head_dim)
        self._slot_bytes = 4 * math.prod(per_slot)
        self._memory = LazyMemory(slots * self._slot_bytes)
        self._rows = self._memory.floats.view(slots, *per_slot)
        per_block = (shape.layers, 2, shape.kv_heads, BLOCK_UNITS, shape.head_dim)
        size = -(-4 * math.prod(per_block) * blocks // mmap.PAGESIZE) * mmap.PAGESIZE
        self._cache_memory = LazyMemory(size)
        self._cache = self._cache_memory.floats[: blocks * math.prod(per_block)].view(blocks, *per_block)
        self._spans: tuple[tuple[int, ...], list[Span]] = ((), [])
        self._kernel = RowKernel(self._rows, shape) if is_fused else None

    def free(self, slots: Values[int]) -> None:
        for slot in slots:
            self._memory.clear(slot * self._slot_bytes, self._slot_bytes)

    def load(self, copies: Values[Copy]) -> None:
        for copy in copies:
            own, cached = self._regions(copy)
            own.copy_(cached)

    def save(self, copies: Values[Copy]) -> None:
        for copy in copies:
            own, cached = self._regions(copy)
            cached.copy_(own)

    def _regions(self, copy: Copy) -> tuple[torch.Tensor, torch.Tensor]:
        own = self._rows[copy.slot, :, :, :, copy.start : copy.start + copy.count]
        return own, self._cache[copy.block, :, :, :, : copy.count]

    def attention(self, layout: Layout, positions: torch.Tensor) -> "RowAttention":
        """For the rows of one step; positions int64 [T]."""
        if self._kernel is not None:
            singles = self._kernel.step(layout.slots()[: layout.singles], positions[: layout.singles])
            return RowAttention(self._rows, self._shape, layout, positions, singles)
        slots = tuple(work.sequence.slot for work in layout.works[: layout.singles])
        lengths = [work.start + 1 for work in layout.works[: layout.singles]]
        if slots != self._spans[0]:
            # While the same sequences go on, all grow alike: the last cut is still the best one.
            self._spans = (slots, cut(slots, lengths))
        return RowAttention(self._rows, self._shape, layout, positions, self._spans[1])


class RowAttention:
    """Attention of one step: singles a span of slots at a time or all in one call, chunks one by one."""

    def __init__(
        self,
        rows: torch.Tensor,  # as above
        shape: DecoderShape,
        layout: Layout,
        positions: torch.Tensor,  # int64 [T]
        singles: list[Span] | SingleTokens,
    ) -> None:
        self._rows, self._shape, self._layout = rows, shape, layout
        self._flat = rows.view(-1, shape.head_dim)
        capacity = rows.shape[-2]
        self._layer_step = 2 * shape.kv_heads * capacity
        # Where each row's keys and values of layer 0 go: [T, 2 * kv_heads], in heads of `capacity` tokens.
        starts = layout.slots() * (shape.layers * self._layer_step) + positions
        self._where = starts[:, None] + torch.arange(2 * shape.kv_heads) * capacity
        spans = singles if isinstance(singles, list) else []
        self._fused = singles if isinstance(singles, SingleTokens) and layout.singles else None
        self._stored = layout.singles if self._fused else 0  # rows that the kernel stores itself
        self._spans = [(span, *_bias(span, layout, positions)) for span in spans]
        self._gaps = _gaps(layout, spans) if spans else None
        self._chunks = [
            (first, work, _causal(work.start, work.count))
            for first, work in list(zip(layout.firsts, layout.works, strict=True))[layout.singles :]
        ]

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        queries, own = heads[:, : self._shape.heads], heads[:, self._shape.heads :]
        if self._stored < len(heads):
            own = own[self._stored :]
            self._flat[layer * self._layer_step :].index_put_((self._where[self._stored :],), own)
        parts: list[torch.Tensor] = []
        if self._fused is not None:
            parts.append(self._fused(layer, heads[: self._stored]))
        elif self._layout.singles:
            parts += self._attend_singles(layer, queries)
        parts += [self._attend_chunk(layer, queries, *chunk) for chunk in self._chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_singles(self, layer: int, queries: torch.Tensor) -> list[torch.Tensor]:
        """The query heads of a group pass as queries of their key head: 28 ms a step, 41 by enable_gqa."""
        shape = self._shape
        queries = queries[: self._layout.singles]
        if self._gaps is not None:
            queries = queries.index_select(0, self._gaps[0])
        queries = queries.view(len(queries), shape.kv_heads, -1, shape.head_dim)  # [n, kv_heads, group, D]
        parts = []
        at = 0
        for span, longest, bias in self._spans:
            keys, values = self._rows[span.first : span.end, layer, :, :, :longest].unbind(1)
            mixed = F.scaled_dot_product_attention(queries[at : at + span.size], keys, values, attn_mask=bias)
            parts.append(mixed.reshape(span.size, -1))
            at += span.size
        return parts if self._gaps is None else [torch.cat(parts).index_select(0, self._gaps[1])]

    def _attend_chunk(
        self, layer: int, queries: torch.Tensor, first: int, work: Work, bias: torch.Tensor | None
    ) -> torch.Tensor:
        keys, values = self._rows[work.sequence.slot, layer, :, None, :, : work.start + work.count]
        mine = queries[first : first + work.count].transpose(0, 1).unsqueeze(0)  # [1, heads, n, D]
        mixed = F.scaled_dot_product_attention(
            mine, keys, values, attn_mask=bias, is_causal=bias is None, enable_gqa=True
        )
        return mixed.squeeze(0).transpose(0, 1).reshape(work.count, -1)


def _capacity(shape: DecoderShape) -> int:
    """The context, rounded up so that each head's tokens fill whole pages."""
    tokens = math.lcm(BLOCK_UNITS, mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, 4 * shape.head_dim))
    return -(-shape.context // tokens) * tokens


def _bias(span: Span, layout: Layout, positions: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Longest of the span, and what is added to its scores [slots, 1, 1, longest]: -inf past each end.

    A slot without a row may see its first token: all masked it would give NaN.
    """
    members = layout.works[span.begin : span.stop]
    longest = max(work.start for work in members) + 1
    last = torch.zeros(span.size, dtype=torch.int64)
    last[[work.sequence.slot - span.first for work in members]] = positions[span.begin : span.stop]
    bias = torch.zeros(span.size, longest)
    bias.masked_fill_(torch.arange(longest) > last[:, None], -math.inf)
    return longest, bias[:, None, None]


def _gaps(layout: Layout, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows to take for each slot of the spans, and where the rows' answers then are; None without gaps."""
    if sum(span.size for span in spans) == layout.singles:
        return None
    taken: list[int] = []
    answers: list[int] = []
    for span in spans:
        at = len(taken)
        taken += [0] * span.size  # whoever's; nobody reads that answer
        for i in range(span.begin, span.stop):
            place = at + layout.works[i].sequence.slot - span.first
            taken[place] = i
            answers.append(place)
    return torch.tensor(taken), torch.tensor(answers)


def _causal(start: int, count: int) -> torch.Tensor | None:
    """What is added to the scores of a chunk [count, start + count]; None where it begins the text."""
    if start == 0:
        return None
    bias = torch.zeros(count, start + count)
    return bias.masked_fill_(
        torch.arange(start + count) > torch.arange(start, start + count)[:, None], -math.inf
    )
