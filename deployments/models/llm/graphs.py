"""CUDA graphs for steps that only decode: one launch a step instead of hundreds.

Owns: the graphs, a power of two of rows each, and the fixed buffers that they read. Must not know:
sampling. Source: PyTorch's "CUDA Graphs" notes; vLLM's capture of decode batch sizes.
"""

import torch

from deployments.models.llm.layout import Layout
from deployments.models.llm.network import Network
from deployments.models.llm.pages import PAGE, PageStore, Tables
from deployments.models.llm.runner import Eager


class Graphed:
    """As Eager, but steps of single tokens replay a graph. Captures all graphs when made.

    Only for a store that has the paged kernel: its launch does not depend on any length.
    """

    def __init__(self, network: Network, store: PageStore, *, slots: int) -> None:
        self._eager = Eager(network, store)
        sizes = [1]
        while sizes[-1] < slots:
            sizes.append(2 * sizes[-1])
        # The largest first: the smaller ones then fit into the same memory pool.
        self._graphs = {size: _Graph(network, store, size) for size in reversed(sizes)}

    def __call__(self, layout: Layout) -> torch.Tensor | None:
        rows = layout.last_rows()
        if layout.singles < layout.rows or not rows:
            return self._eager(layout)
        size = 1 << (layout.rows - 1).bit_length()
        logits = self._graphs[size](layout)
        return logits if len(rows) == layout.rows else logits[rows]


class _Graph:
    """The decode of up to `size` rows. Rows without a sequence write to the scratch page."""

    def __init__(self, network: Network, store: PageStore, size: int) -> None:
        self._store, self._size = store, size
        device = store.device
        context = store.shape.context
        scratch = store.blocks * PAGE
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._tables = Tables(
            where=torch.full_like(self._ids, scratch),
            starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            used=torch.ones(size, dtype=torch.int32, device=device),
            pages=torch.full((size, -(-context // PAGE)), store.blocks, dtype=torch.int32, device=device),
            longest_q=1,
            longest_k=context,
        )
        attention = store.paged(self._tables)

        def forward() -> torch.Tensor:
            return network.logits(network(self._ids, self._positions, attention))

        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(side):
            forward()  # libraries allocate their workspaces outside of the capture
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._logits = forward()

    def __call__(self, layout: Layout) -> torch.Tensor:
        """[rows, V] float32, valid until the next call."""
        tables = self._store.tables(layout)
        rows = layout.rows
        self._ids[:rows] = torch.tensor(layout.ids(), device=self._ids.device)
        self._positions[:rows] = layout.positions().to(self._ids.device)
        for own, new in (
            (self._tables.where, tables.where),
            (self._tables.used, tables.used),
            (self._tables.pages[:, : tables.pages.shape[1]], tables.pages),
        ):
            own[:rows] = new
        # What is left of the step before must neither write to a page nor read a long text.
        self._tables.where[rows:] = self._store.blocks * PAGE
        self._tables.used[rows:] = 1
        self._graph.replay()
        return self._logits[:rows]
