"""The network on a GPU: pages, the paged kernel, graphs. Needs an NVIDIA GPU (pytest -m gpu)."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.models.llm.network import Network, load_network
from deployments.models.llm.pages import PAGE
from deployments.models.llm.stores import block_facts, make_runner
from tests.llm_loop import Greedy, advance, expect, reference_logits, sequence, step, work, write_checkpoint

pytestmark = pytest.mark.gpu

# FlashAttention takes heads of a multiple of 8; 64 is what real models have.
WIDE = {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return write_checkpoint(folder, "llama", **WIDE), folder


def load(folder: Path, dtype: torch.dtype | None = None) -> Network:
    return load_network(folder, "cuda", dtype)


def test_gpu_blocks_are_pages_shared_in_place(llama: tuple[Any, Path]) -> None:
    facts = block_facts(load(llama[1]))
    assert (facts.block_units, facts.shares_blocks) == (PAGE, True)
    assert facts.block_bytes == PAGE * 3 * 2 * 2 * 64 * 2


def test_bfloat16_logits_follow_float32_through_chunks_graphs_and_page_borders(
    llama: tuple[Any, Path],
) -> None:
    model, folder = llama
    greedy = Greedy()
    runner = make_runner(load(folder), greedy, slots=6, blocks=24)
    rng = random.Random(2)
    lengths = (250, 3, 300, 40, 1)
    ones = [
        sequence(
            [rng.randrange(97) for _ in range(n)],
            slot,
            most=99,
            blocks=[3 * slot + 1, 3 * slot, 3 * slot + 2],
        )
        for slot, n in enumerate(lengths)
    ]
    for turn in range(30):
        works = [work(one, 70) for one in ones if turn < 8 or rng.random() < 0.7]
        if not works:
            continue
        advance(runner, step(works))
        lasting = sorted((w for w in works if w.is_last), key=lambda w: (w.count > 1, w.sequence.slot))
        for one, logits in zip(lasting, greedy.logits if lasting else [], strict=True):
            expected = reference_logits(model, one.sequence.tokens[: one.start + one.count])
            assert (logits.cpu() - expected).abs().max() < 0.05 * expected.abs().max()


def test_float32_greedy_text_on_the_gpu_equals_transformers(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    runner = make_runner(load(folder, torch.float32), Greedy(), slots=4, blocks=8)
    ones = [sequence([3, 1, 4, slot], slot, most=16, blocks=[slot]) for slot in range(3)]
    for _ in range(16):
        advance(runner, step([work(one) for one in ones]))
    for slot, one in enumerate(ones):
        assert one.payload.tokens == expect(model, [3, 1, 4, slot], 16)


def test_graphs_give_what_the_eager_forward_gives(llama: tuple[Any, Path]) -> None:
    from deployments.models.llm.graphs import Graphed
    from deployments.models.llm.layout import arrange
    from deployments.models.llm.pages import PageStore
    from deployments.models.llm.runner import Eager

    network = load(llama[1])
    store = PageStore(network.shape, blocks=8, device=network.device, dtype=network.dtype)
    if not store.has_kernel:
        pytest.skip("this PyTorch has no attention over block tables on this GPU")
    eager, graphed = Eager(network, store), Graphed(network, store, slots=5)
    ones = [sequence(list(range(1, 4 + slot)), slot, blocks=[slot]) for slot in range(5)]
    with torch.inference_mode():
        for one in ones:
            eager(arrange([work(one)]))
            one.computed = one.known - 1
        for count in (5, 3, 1):
            layout = arrange([work(one) for one in ones[:count]])
            expected, found = eager(layout), graphed(layout)
            assert expected is not None
            assert found is not None
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
