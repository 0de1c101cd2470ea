"""The 8-bit variant of a language model: near the network it came from, and no row changed by another."""

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.core.errors import ModelBroken
from deployments.engine.sequence import Copy
from deployments.models.llm import quality
from deployments.models.llm.int8 import quantise
from deployments.models.llm.network import Network, load_network
from deployments.models.llm.runner import LLMRunner
from deployments.models.llm.stores import make_runner
from deployments.models.smollm2 import SmolLM2
from deployments.runtime.optimise import native
from deployments.runtime.optimise.found import CantOptimise
from deployments.runtime.optimise.int8_linear import End, Int8Linear
from tests.llm_loop import KINDS, Greedy, advance, sequence, step, work, write_checkpoint

SLOTS, BLOCKS = 6, 24


pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(folder: Path, kind: str, **changes: Any) -> tuple[Network, Network]:
    """(fp32, 8 bits) of one random checkpoint."""
    write_checkpoint(folder, kind, **changes)
    network = load_network(folder, "cpu")
    quantise(network)
    return load_network(folder, "cpu"), network


def texts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(97) for _ in range(source.randint(2, longest))] for _ in range(count)]


def logits_of(
    network: Network, groups: list[list[int]], company: int, chunk: int = 512
) -> list[torch.Tensor]:
    """After each decode step of the first text, with `company` of the others beside it."""
    greedy = Greedy()
    runner: LLMRunner = make_runner(network, greedy, slots=SLOTS, blocks=BLOCKS)
    ones = [sequence(list(text), slot, most=99) for slot, text in enumerate(groups[: 1 + company])]
    found: list[torch.Tensor] = []
    for _ in range(12):
        works = [work(one, chunk) for one in ones]
        place = sorted(works, key=lambda w: (w.count > 1, w.sequence.slot)).index(works[0])
        is_single = works[0].count == 1
        advance(runner, step(works))
        if is_single:
            found.append(greedy.logits[place])
    return found


@pytest.mark.parametrize("rows", [1, 5, 8, 21])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 96), (50, 41), (3, 1)])
@pytest.mark.parametrize("end", End)
def test_product_is_near_the_exact_one_and_each_row_stands_alone(
    rows: int, inputs: int, outputs: int, end: End
) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs * (2 if end == End.GATED else 1), inputs), torch.randn(outputs)
    x, other = torch.randn(rows, inputs), torch.randn(rows, outputs) if end == End.PLUS else None
    x[0] *= 1000  # an outlier among batch-mates
    normed = x / torch.sqrt((x * x).sum(1, keepdim=True) + 0.5)
    linear = Int8Linear(weight, bias if end != End.GATED else None, end=end, floor=0.5)
    if end == End.GATED:
        gate, up = (normed @ half.t() for half in weight.chunk(2))
        exact = torch.nn.functional.silu(gate) * up
    else:
        exact = normed @ weight.t() + bias + (0 if other is None else other)
    found = linear(x, other)
    assert (found - exact).norm() < 0.02 * exact.norm().clamp_min(1e-3 + (normed @ weight.t()).norm())
    for row in range(rows):
        alone = linear(x[row : row + 1], None if other is None else other[row : row + 1])
        assert torch.equal(alone[0], found[row])


def test_nan_stays_in_its_row() -> None:
    linear = Int8Linear(torch.randn(40, 32))
    x = torch.randn(5, 32)
    x[2, 7], x[4, 0] = float("nan"), float("inf")
    finite = linear(x).isfinite()
    assert finite[[0, 1, 3]].all()
    assert not finite[[2, 4]].any()


def test_zeros_give_the_bias() -> None:
    bias = torch.randn(40)
    assert torch.equal(Int8Linear(torch.randn(40, 32), bias)(torch.zeros(2, 32)), bias.expand(2, -1))
    assert torch.equal(Int8Linear(torch.zeros(40, 32), bias)(torch.ones(2, 32)), bias.expand(2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_the_network_it_came_from(kind: str, tmp_path: Path) -> None:
    exact, rounded = quantised(tmp_path, kind)
    found = quality.compare(exact, rounded, texts(3, seed=5))
    assert found.mean_cosine > 0.99
    assert found.perplexity[1] < 1.3 * found.perplexity[0]


def test_network_against_itself_agrees_in_everything(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    network = load_network(tmp_path, "cpu")
    found = quality.compare(network, network, texts(2, seed=1))
    assert found.agreement == 1.0
    assert found.worst_cosine > 1 - 1e-6
    assert found.perplexity[0] == found.perplexity[1]


# head_dim 16 attends by our kernel, 8 by torch's.
@pytest.mark.parametrize(("head_dim", "heads"), [(8, 6), (16, 6), (64, 4)])
def test_batch_mates_change_nothing(head_dim: int, heads: int, tmp_path: Path) -> None:
    _, rounded = quantised(tmp_path, "llama", head_dim=head_dim, num_attention_heads=heads)
    groups = texts(6, seed=head_dim)
    alone = logits_of(rounded, groups, 0)
    assert len(alone) == 11
    for company in (1, 5):
        for one, other in zip(alone, logits_of(rounded, groups, company), strict=True):
            if head_dim in (16, 64):
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_own_attention_gives_what_torchs_gives(tmp_path: Path) -> None:
    """Fed with the same text as one chunk and token by token, which the two ways compute."""
    _, rounded = quantised(tmp_path, "llama-tied")
    (text,) = [(texts(1, seed=8)[0] * 40)[:300]]
    found = []
    for chunk in (1, 299):
        greedy = Greedy()
        runner = make_runner(rounded, greedy, slots=2, blocks=BLOCKS)
        one = sequence(list(text), 1, most=99)
        while one.computed < len(text):
            advance(runner, step([work(one, chunk)]))
        found.append(greedy.logits[0])
    # Rounding to 8 bits magnifies last bits where a value lies between two steps.
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.999


def test_cached_prefix_gives_the_same_text(tmp_path: Path) -> None:
    _, rounded = quantised(tmp_path, "llama-tied")
    runner = make_runner(rounded, Greedy(), slots=SLOTS, blocks=BLOCKS)
    text = (texts(1, seed=4)[0] * 40)[:50]
    first = sequence(text, 0, most=6)
    for _ in range(3):
        advance(runner, step([work(first)]))
    saves = [Copy(0, 20, 0, 16), Copy(0, 3, 16, 16), Copy(0, 11, 32, 16)]
    second = sequence(text, 5, most=6)
    second.computed = 48
    loads = [Copy(5, block.block, block.start, 16) for block in saves]
    advance(runner, step([work(first), work(second)], saves=saves, freed=[5], loads=loads))
    for _ in range(2):
        advance(runner, step([work(first), work(second)]))
    while len(second.payload.tokens) < 6:
        advance(runner, step([work(second)]))
    assert second.payload.tokens == first.payload.tokens


def test_nan_in_one_row_fails_that_sequence_alone(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama-tied", tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[13] = float("nan")
    model.save_pretrained(tmp_path)
    network = load_network(tmp_path, "cpu")
    quantise(network)
    runner = make_runner(network, Greedy(), slots=SLOTS, blocks=BLOCKS)
    ones = [sequence(tokens, slot) for slot, tokens in enumerate(([1, 2, 3], [6, 13, 7], [4, 5]))]
    advances = advance(runner, step([work(one) for one in ones]))
    assert isinstance(advances[1].error, ModelBroken)
    late = sequence([8], 1)
    for _ in range(3):  # in its place, and beside its old neighbours
        advances = advance(runner, step([work(ones[0]), work(late), work(ones[2])], freed=[]))
        assert all(made.error is None for made in advances)


def test_without_a_compiler_it_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native.library.cache_clear()
    try:
        with pytest.raises(CantOptimise, match=r"none of g\+\+.* is installed"):
            Int8Linear(torch.randn(4, 4))
    finally:
        native.library.cache_clear()


def test_kernels_without_this_cpus_instructions_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    weight, bias, x = torch.randn(2 * 41, 70), torch.randn(2 * 41), torch.randn(11, 70)
    native_answer = Int8Linear(weight, bias, end=End.GATED, floor=0.1)(x)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", [flag for flag in native._FLAGS if not flag.startswith("-m")])
    native.library.cache_clear()
    try:
        torch.testing.assert_close(Int8Linear(weight, bias, end=End.GATED, floor=0.1)(x), native_answer)
    finally:
        native.library.cache_clear()


def test_other_variants_are_left_to_whoever_makes_them(tmp_path: Path) -> None:
    assert SmolLM2(str(tmp_path)).optimise("torchscript") is False
