"""Which memory and which runner a network gets: rows on a CPU, pages on a GPU.

Owns: that choice, and what the engine must know of it. Must not know: how either works.
"""

import math
from dataclasses import dataclass

from deployments.models.llm import pages, rows
from deployments.models.llm.attend import HEAD_SIZES
from deployments.models.llm.graphs import Graphed
from deployments.models.llm.int8 import Int8Head
from deployments.models.llm.network import Network
from deployments.models.llm.runner import Eager, LLMRunner
from deployments.models.llm.sampler import Sampler


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """block_units: tokens of a block. block_bytes: of its keys and values, all layers."""

    block_units: int
    block_bytes: int
    shares_blocks: bool


def block_facts(network: Network) -> BlockFacts:
    """Of the memory that `make_runner` will give this network."""
    shape = network.shape
    is_paged = network.device.type != "cpu"
    units = pages.PAGE if is_paged else rows.BLOCK_UNITS
    values = math.prod((shape.layers, 2, shape.kv_heads, units, shape.head_dim))
    return BlockFacts(units, values * network.dtype.itemsize, shares_blocks=is_paged)


def make_runner(network: Network, sampler: Sampler, *, slots: int, blocks: int) -> LLMRunner:
    """A runner with memory for `slots` sequences at once and `blocks` blocks."""
    if network.device.type == "cpu":
        is_fused = isinstance(network.head, Int8Head) and network.shape.head_dim in HEAD_SIZES
        row_store = rows.RowStore(network.shape, slots=slots, blocks=blocks, is_fused=is_fused)
        return LLMRunner(Eager(network, row_store), row_store, sampler)
    store = pages.PageStore(network.shape, blocks=blocks, device=network.device, dtype=network.dtype)
    forward = Graphed(network, store, slots=slots) if store.has_kernel else Eager(network, store)
    return LLMRunner(forward, store, sampler)
