import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.core.errors import InvalidItem, ModelBroken, ModelFailed
from deployments.engine.sequence import Copy
from deployments.models.llm.config import SERVED, read_shape
from deployments.models.llm.network import Network, load_network
from deployments.models.llm.pages import PAGE, PageStore
from deployments.models.llm.rows import RowStore
from deployments.models.llm.runner import Eager, LLMRunner
from deployments.models.llm.spans import Span, cut
from deployments.models.llm.stores import block_facts, make_runner
from tests.llm_loop import (
    KINDS,
    FakeChoice,
    Greedy,
    advance,
    edit_config,
    expect,
    reference_logits,
    sequence,
    step,
    work,
    write_checkpoint,
)

SLOTS, BLOCKS = 6, 24


def paged_runner(network: Network, sampler: Any) -> LLMRunner:
    store = PageStore(network.shape, blocks=BLOCKS, device=network.device, dtype=network.dtype)
    return LLMRunner(Eager(network, store), store, sampler)


def row_runner(network: Network, sampler: Any) -> LLMRunner:
    return make_runner(network, sampler, slots=SLOTS, blocks=BLOCKS)


RUNNERS = {"rows": row_runner, "pages": paged_runner}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network]:
    folder = tmp_path_factory.mktemp("llama")
    return write_checkpoint(folder, "llama"), load_network(folder, "cpu")


def prompts(count: int, seed: int = 0, longest: int = 70) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def blocks_for(i: int) -> list[int]:
    """Pages of the i-th sequence, in no order: enough for 600 tokens."""
    return [3 * i + 2, 3 * i, 3 * i + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", RUNNERS)
def test_ragged_steps_of_chunks_and_decodes_give_transformers_logits(
    kind: str, memory: str, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path, kind)
    greedy = Greedy()
    runner = RUNNERS[memory](load_network(tmp_path, "cpu"), greedy)
    texts = prompts(4, seed=3, longest=300)
    texts[0] = texts[0] * 300  # over one page
    slots = (4, 0, 5, 2)
    ones = [sequence(t[:520], s, most=99, blocks=blocks_for(s)) for s, t in zip(slots, texts, strict=True)]
    ones[2].tokens, ones[2].known = ones[2].tokens[:1], 1
    rng = random.Random(1)
    seen = 0
    for _ in range(40):
        works = [work(one, rng.choice((1, 7, 64, 300))) for one in ones if rng.random() < 0.8]
        if not works:
            continue
        advance(runner, step(works))
        lasting = sorted((w for w in works if w.is_last), key=lambda w: (w.count > 1, w.sequence.slot))
        for one, logits in zip(lasting, greedy.logits if lasting else [], strict=True):
            expected = reference_logits(model, one.sequence.tokens[: one.start + one.count])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            ours, theirs = logits.log_softmax(-1), expected.log_softmax(-1)
            assert (ours - theirs).abs().max() < 1e-4
            seen += 1
    assert seen > 30


@pytest.mark.parametrize("memory", RUNNERS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_greedy_text_equals_transformers_whatever_the_chunks_and_slots(
    llama: tuple[Any, Network], memory: str, chunk: int
) -> None:
    model, network = llama
    runner = RUNNERS[memory](network, Greedy())
    texts = prompts(5, seed=chunk)
    slots = random.Random(chunk).sample(range(SLOTS), 5)
    ones = [sequence(t, s, most=12, blocks=blocks_for(s)) for t, s in zip(texts, slots, strict=True)]
    alive = list(ones)
    while alive:
        advances = advance(runner, step([work(one, chunk) for one in alive]))
        alive = [one for one, made in zip(alive, advances, strict=True) if not made.is_done]
    for text, one in zip(texts, ones, strict=True):
        assert one.payload.tokens == expect(model, text, 12)
        assert one.tokens == text + one.payload.tokens


def test_preempted_sequence_recomputed_in_another_slot_goes_on_as_before(llama: tuple[Any, Network]) -> None:
    model, network = llama
    runner = row_runner(network, Greedy())
    mine, other = prompts(2, seed=9)
    one = sequence(mine, 1, most=14)
    for _ in range(5):
        advance(runner, step([work(one)]))
    one.computed, one.slot = 0, 3
    newcomer = sequence(other, 1, most=9)
    advance(runner, step([work(newcomer), work(one, 6)], freed=[1]))
    while len(one.payload.tokens) < 14:
        works = [work(one, 20)] + ([work(newcomer)] if len(newcomer.payload.tokens) < 9 else [])
        advance(runner, step(works))
    assert one.payload.tokens == expect(model, mine, 14)
    assert newcomer.payload.tokens == expect(model, other, 9)


def test_cached_blocks_loaded_into_another_row_give_the_same_text(llama: tuple[Any, Network]) -> None:
    model, network = llama
    runner = row_runner(network, Greedy())
    text = (prompts(1, seed=4)[0] * 40)[:50]
    first = sequence(text, 0, most=6)
    for _ in range(3):
        advance(runner, step([work(first)]))
    saves = [Copy(0, 20, 0, 16), Copy(0, 3, 16, 16), Copy(0, 11, 32, 16)]
    second = sequence(text, 5, most=6)
    second.computed = 48
    # Row 0 is freed in the step that saves it, and in use again by a third.
    third = sequence(text[:7], 0, most=6)
    loads = [Copy(5, block.block, block.start, 16) for block in saves]
    advance(runner, step([work(second), work(third)], saves=saves, freed=[0, 5], loads=loads))
    for _ in range(5):
        advance(runner, step([work(second), work(third)]))
    assert second.payload.tokens == expect(model, text, 6)
    assert third.payload.tokens == expect(model, text[:7], 6)


def test_nan_in_one_row_fails_that_sequence_alone(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama")
    model.model.embed_tokens.weight.data[13] = float("nan")
    model.save_pretrained(tmp_path)
    runner = row_runner(load_network(tmp_path, "cpu"), Greedy())
    good = [sequence([1, 2, 3], 0), sequence([4, 5], 2)]
    bad = sequence([6, 13, 7], 1)
    advances = advance(runner, step([work(good[0]), work(bad), work(good[1])]))
    assert isinstance(advances[1].error, ModelBroken)
    assert advances[0].error is None
    assert advances[2].error is None
    # Its row stays in the middle of the others' span, and is then freed and used again.
    advance(runner, step([work(one) for one in good]))
    late = sequence([8, 9], 1)
    advance(runner, step([work(good[0]), work(late), work(good[1])], freed=[1]))
    for _ in range(5):
        advance(runner, step([work(one) for one in (*good, late)]))
    for one, text in ((good[0], [1, 2, 3]), (good[1], [4, 5]), (late, [8, 9])):
        assert one.payload.tokens == expect(model, text, 8)[: len(one.payload.tokens)]


def test_choice_that_raises_fails_its_own_sequence_alone(llama: tuple[Any, Network]) -> None:
    runner = row_runner(llama[1], Greedy())
    ones = [sequence([1, 2], slot) for slot in range(3)]
    ones[0].payload = FakeChoice(8, raises=RuntimeError("text of the prompt"))
    ones[1].payload = FakeChoice(8, raises=InvalidItem("no such thing"))
    advances = runner.run(step([work(one) for one in ones]))
    assert isinstance(advances[0].error, ModelFailed)
    assert "text of the prompt" not in advances[0].error.message
    assert isinstance(advances[1].error, InvalidItem)
    assert advances[2].error is None
    assert advances[2].units == 1


def test_last_token_ends_the_sequence_and_parts_of_a_prompt_add_nothing(llama: tuple[Any, Network]) -> None:
    runner = row_runner(llama[1], Greedy())
    one, part = sequence([5, 6, 7], 0, most=1), sequence([5, 6, 7], 1)
    done, nothing = advance(runner, step([work(one), work(part, 2)]))
    assert (done.is_done, done.units, done.token) == (True, 0, one.payload.tokens[0])
    assert len(done.outputs) == 1
    assert (nothing.units, nothing.token, nothing.outputs, nothing.is_done) == (0, None, (), False)
    assert runner.times.run_s > 0


def test_step_without_work_only_moves_memory(llama: tuple[Any, Network]) -> None:
    runner = row_runner(llama[1], Greedy())
    assert runner.run(step([], freed=[0, 1], saves=[Copy(2, 0, 0, 16)])) == []


def resident_bytes(address: int) -> int:
    """Of the mapping that holds this address, as the kernel counts it."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_here and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


def test_rows_take_memory_when_written_and_give_it_back_when_freed(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    write_checkpoint(tmp_path, "llama", **wide, max_position_embeddings=16_384)
    network = load_network(tmp_path, "cpu")
    token_bytes = block_facts(network).block_bytes // 16
    assert token_bytes == 2 * 2 * 8 * 64 * 4
    store = RowStore(network.shape, slots=64, blocks=4096)
    runner = LLMRunner(Eager(network, store), store, Greedy())
    address = store._rows.data_ptr()
    before = resident_bytes(address)
    ones = [sequence([1] * 1600, slot) for slot in range(3)]
    for one in ones:
        advance(runner, step([work(one)]))
    assert resident_bytes(address) - before == 3 * 1600 * token_bytes  # 100 blocks each, and no page more
    runner.run(step([], freed=[0, 2]))
    assert resident_bytes(address) - before == 1600 * token_bytes
    advance(runner, step([work(ones[1])]))
    assert resident_bytes(address) - before == 1616 * token_bytes


def test_block_of_16_tokens_is_counted_whole(llama: tuple[Any, Network]) -> None:
    facts = block_facts(llama[1])
    assert (facts.block_units, facts.shares_blocks) == (16, False)
    assert facts.block_bytes == 16 * 3 * 2 * 2 * 8 * 4


def test_pages_of_a_shared_prefix_serve_two_sequences(llama: tuple[Any, Network]) -> None:
    model, network = llama
    runner = paged_runner(network, Greedy())
    text = (prompts(1, seed=4)[0] * 40)[: PAGE + 9]
    first = sequence(text, 0, most=4, blocks=[5, 6])
    advance(runner, step([work(first)]))
    second = sequence(text, 1, most=4, blocks=[5, 9])
    second.computed = PAGE
    for _ in range(3):
        advance(runner, step([work(first), work(second)]))
    advance(runner, step([work(second)]))
    assert first.payload.tokens == second.payload.tokens == expect(model, text, 4)


def test_sequence_cancelled_while_its_step_starts_disturbs_nobody(llama: tuple[Any, Network]) -> None:
    model, network = llama
    runner = paged_runner(network, Greedy())
    first, gone = sequence([3, 1, 4], 0, most=2, blocks=[0]), sequence([1, 5], 1, blocks=[1])
    planned = step([work(first), work(gone)])
    gone.blocks = []  # the engine took them back between the plan and the run
    advance(runner, planned)
    advance(runner, step([work(first)]))
    assert first.payload.tokens == expect(model, [3, 1, 4], 2)


def test_spans_cover_every_slot_once_and_separate_the_long_from_the_short() -> None:
    assert cut([], []) == []
    assert cut([3], [10]) == [Span(3, 4, 0, 1)]
    lengths = [30, 40, 2000, 35, 20, 50]
    spans = cut([0, 1, 2, 3, 4, 9], lengths)
    assert [(s.first, s.end) for s in spans] == [(0, 2), (2, 3), (3, 10)]
    rng = random.Random(5)
    for _ in range(200):
        slots = sorted(rng.sample(range(40), rng.randint(1, 20)))
        spans = cut(slots, [rng.randint(1, 900) for _ in slots])
        assert [i for s in spans for i in range(s.begin, s.stop)] == list(range(len(slots)))
        for span in spans:
            assert (span.first, span.end) == (slots[span.begin], slots[span.stop - 1] + 1)


def test_checkpoint_in_shards_reads_as_one(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    greedy = Greedy()
    runner = row_runner(load_network(tmp_path / "shards", "cpu"), greedy)
    advance(runner, step([work(sequence([3, 1, 4], 0))]))
    torch.testing.assert_close(greedy.logits[0], reference_logits(model, [3, 1, 4]), atol=1e-4, rtol=1e-4)
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing; model\.safetensors\.index\.json names it"):
        load_network(tmp_path / "shards", "cpu")


def test_index_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="of its own folder"):
        load_network(tmp_path, "cpu")


def test_half_precision_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    greedy = Greedy()
    network = load_network(tmp_path, "cpu")
    assert network.dtype == torch.float32
    advance(row_runner(network, greedy), step([work(sequence([3, 1, 4], 0))]))
    expected = reference_logits(model.to(torch.float32), [3, 1, 4])
    torch.testing.assert_close(greedy.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_network_follows_float32_closely(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3", initializer_range=0.05)
    greedy = Greedy()
    network = load_network(tmp_path, "cpu", torch.bfloat16)
    advance(paged_runner(network, greedy), step([work(sequence([3, 1, 4], 0, blocks=[0]))]))
    expected = reference_logits(model, [3, 1, 4])
    assert (greedy.logits[0] - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not served; served are LlamaForCausalLM",
        ),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not served"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not served"),
        ({"hidden_size": 48.5}, "hidden_size must be a positive whole number, not 48.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number"),
        ({"num_key_value_heads": 4}, "must be a multiple of 4 key-value heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not served"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding-window attention is not served"),
        ({"vocab_size": 98}, r"model.embed_tokens.weight is \[97, 48\], not \[98, 48\]"),
        ({"num_hidden_layers": 4}, "missing: model.layers.3"),
        ({"num_hidden_layers": 2}, "not of this architecture: model.layers.2"),
    ],
)
def test_config_that_cannot_be_served_says_why(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path, "cpu")


def test_sliding_windows_are_refused_unless_switched_off(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mistral")
    edit_config(tmp_path, sliding_window=4096)
    with pytest.raises(ValueError, match="sliding-window"):
        load_network(tmp_path, "cpu")
    config = {**json.loads((tmp_path / "config.json").read_text()), "architectures": ["Qwen2ForCausalLM"]}
    assert read_shape({**config, "use_sliding_window": False}).qkv_bias
    assert len(SERVED) == 4


def test_older_configs_with_rope_theta_at_the_top_read_the_same(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "llama3-rope")
    scaling = dict(json.loads((tmp_path / "config.json").read_text())["rope_parameters"])
    theta = scaling.pop("rope_theta")
    edit_config(tmp_path, rope_parameters=None, rope_scaling=scaling, rope_theta=theta)
    greedy = Greedy()
    text = [7] * 90 + [3]
    advance(row_runner(load_network(tmp_path, "cpu"), greedy), step([work(sequence(text, 0))]))
    torch.testing.assert_close(greedy.logits[0], reference_logits(model, text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "zeros", "pickle", "none"])
def test_damaged_weights_are_one_clear_error(damage: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    if damage == "none":
        file.rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="weights are read from safetensors alone"):
            load_network(tmp_path, "cpu")
        return
    file.write_bytes({"cut": whole[:-100], "zeros": bytes(1000), "pickle": b"\x80\x04" + whole}[damage])
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        load_network(tmp_path, "cpu")


def test_row_store_has_room_for_the_whole_context_of_every_slot(llama: tuple[Any, Network]) -> None:
    model, network = llama
    runner = row_runner(network, Greedy())
    text = (prompts(1, seed=8)[0] * 600)[:599]
    ones = [sequence(text, slot, most=1) for slot in (0, SLOTS - 1)]
    for one in ones:
        advance(runner, step([work(one)]))
        assert one.payload.tokens == expect(model, text, 1)
