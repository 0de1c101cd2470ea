"""The batched sampler, against plain definitions of each option on the whole distribution."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from deployments.core.generation import Sampling
from deployments.models import smollm2
from deployments.models.llm import sampler as under_test
from deployments.models.llm.choice import Choice, Ending, Sampled, Vocabulary
from deployments.models.llm.grammar import GrammarCompiler
from deployments.models.llm.sampler import Sampler

VOCAB = 1000
DRAWS = 4000


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = Tokenizer(models.BPE({f"t{i}": i for i in range(VOCAB)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def shipped() -> Path:
    """The real cache: only the first test run on a machine converts."""
    return smollm2.shipped()


Make = Callable[..., Choice]


@pytest.fixture(scope="module")
def make(vocabulary: Vocabulary) -> Make:
    def make(
        prompt: Sequence[int] = (), seed: int = 0, generated: Sequence[int] = (), **options: Any
    ) -> Choice:
        ending = Ending(max_tokens=10**6)
        choice = Choice(vocabulary, prompt, sampling=Sampling(**options), ending=ending, seed=seed)
        for token in generated:
            choice.accept(Sampled(token))
        return choice

    return make


def some_logits(rows: int = 1, vocab: int = VOCAB, spread: float = 3.0, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    return [one.token for one in Sampler().sample(logits.clone(), choices)]


def draw_often(make: Make, logits: torch.Tensor, **options: Any) -> torch.Tensor:
    """Frequencies [V] over many seeds."""
    rows = logits.expand(DRAWS, -1).clone()
    tokens = sample(rows, [make(seed=seed, **options) for seed in range(DRAWS)])
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / DRAWS


def assert_same_distribution(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square over the cells that expect 5 draws or more, the others together."""
    assert found[expected == 0].sum() == 0
    big = expected * DRAWS >= 5
    cells = torch.cat([expected[big], expected[~big].sum()[None]]) * DRAWS
    seen = torch.cat([found[big], found[~big].sum()[None]]) * DRAWS
    free = int((cells > 0).sum()) - 1
    chi = float(((seen - cells) ** 2 / cells.clamp_min(1e-9)).sum())
    assert chi <= free + 4 * math.sqrt(2 * free), (chi, free)


def nucleus(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The plain definition: probabilities [V] float64."""
    probabilities = (logits.double() / temperature).softmax(0)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    order = probabilities.argsort(descending=True)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


def test_greedy_rows_take_the_first_of_the_best(make: Make) -> None:
    logits = some_logits(16, 49_152)
    logits[3, [700, 40_000]] = 99.0
    found = sample(logits, [make(temperature=0.0)] * 16)
    assert found == logits.argmax(1).tolist()
    assert found[3] == 700


@pytest.mark.parametrize("vocab", [1, 5, 127, 129, 1000])
def test_any_size_of_vocabulary_works(make: Make, vocab: int) -> None:
    logits = some_logits(3, vocab)
    choices = [make(temperature=0.0), make(), make(top_p=0.9, top_logprobs=5 if vocab > 5 else 0)]
    found = sample(logits, choices)
    assert found[0] == logits[0].argmax()
    assert all(0 <= token < vocab for token in found)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 2.0, "top_k": 200, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "min_p": 0.02, "top_k": 30, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 10**9, "top_p": 0.5},
    ],
)
def test_draws_follow_the_plain_definition(make: Make, options: dict[str, Any]) -> None:
    logits = some_logits()[0]
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    assert_same_distribution(draw_often(make, logits, **options), nucleus(logits, **plain))


def test_a_flat_nucleus_wider_than_every_first_try_is_found(make: Make) -> None:
    logits = some_logits(vocab=20_000, spread=0.1)
    tokens = set(sample(logits.expand(300, -1).clone(), [make(seed=seed, top_p=0.9) for seed in range(300)]))
    expected = nucleus(logits[0], temperature=1, top_k=0, top_p=0.9, min_p=0)
    assert len(tokens) > 250
    assert all(expected[token] > 0 for token in tokens)


def test_a_seed_gives_the_same_tokens_whoever_shares_the_batch(make: Make) -> None:
    logits = some_logits(16, 49_152)
    variants: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 40},
        {"min_p": 0.05},
        {"presence_penalty": 1.0},
    ]
    for options in variants:
        alone = sample(logits[:1], [make(seed=7, prompt=[1], **options)])
        mates = [make(seed=i, top_p=0.999, temperature=2.0) for i in range(8)]
        mates += [make(temperature=0.0), *(make(seed=i) for i in range(6))]
        crowd = sample(logits, [make(seed=7, prompt=[1], **options), *mates])
        assert crowd[0] == alone[0]


def test_logits_off_by_rounding_rarely_change_a_seeded_token(make: Make) -> None:
    """The reason for Gumbel noise: with one number a row against the cumulated probabilities, 1 in 30."""
    logits = some_logits(1, 49_152, spread=2.0).expand(256, -1)
    noisy = logits + 1e-4 * some_logits(256, 49_152, spread=1.0, seed=6)
    choices = [make(seed=seed) for seed in range(256)]
    changed = sum(a != b for a, b in zip(sample(logits, choices), sample(noisy, choices), strict=True))
    assert changed <= 1


def test_each_position_and_each_seed_has_its_own_noise(make: Make) -> None:
    logits = torch.zeros(1, VOCAB)
    positions = {sample(logits, [make(seed=1, generated=[0] * count)])[0] for count in range(50)}
    seeds = {sample(logits, [make(seed=seed)])[0] for seed in range(50)}
    assert len(positions) > 40
    assert len(seeds) > 40


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(make: Make, seed: int) -> None:
    first, second = (sample(torch.zeros(1, VOCAB), [make(seed=seed)]) for _ in range(2))
    assert first == second


def test_noise_is_uniform_before_it_is_gumbel() -> None:
    keys = torch.tensor([under_test._key(seed, 3) for seed in range(64)])
    uniform = torch.exp(-torch.exp(-under_test._gumbel(keys, torch.arange(4096))))
    counts = torch.histc(uniform.float(), bins=100, min=0, max=1)
    expected = uniform.numel() / 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 99 + 4 * math.sqrt(2 * 99)
    neighbours = torch.corrcoef(uniform.flatten()[: 2 * 10**5].view(-1, 2).T)
    assert abs(float(neighbours[0, 1])) < 0.015


def test_presence_and_frequency_count_what_was_generated_only(make: Make) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([5.0, 4.9, 4.0, 3.0])
    assert sample(logits, [make(prompt=[0], temperature=0.0, presence_penalty=1.0)]) == [0]
    assert sample(logits, [make(generated=[0], temperature=0.0, presence_penalty=1.0)]) == [1]
    assert sample(logits, [make(generated=[0, 0, 1], temperature=0.0, frequency_penalty=0.6)]) == [1]
    assert sample(logits, [make(generated=[0, 1], temperature=0.0, presence_penalty=-1.0)]) == [0]


def test_repetition_looks_at_the_prompt_too_and_at_the_sign(make: Make) -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, :2] = torch.tensor([2.0, 1.5])
    assert sample(logits, [make(prompt=[0], temperature=0.0, repetition_penalty=2.0)]) == [1]
    logits[0, :2] = torch.tensor([-1.0, -1.5])
    assert sample(logits, [make(generated=[0], temperature=0.0, repetition_penalty=2.0)]) == [1]


def test_bias_moves_greedy_and_drawn_rows(make: Make) -> None:
    logits = some_logits(2)
    bias = {17: 100.0}
    assert sample(logits, [make(temperature=0.0, logit_bias=bias), make(logit_bias=bias)]) == [17, 17]


def test_a_ban_of_all_but_one_leaves_that_one(make: Make) -> None:
    bias = {token: -100.0 for token in range(VOCAB) if token != 3}
    assert sample(some_logits(), [make(logit_bias=bias)]) == [3]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_logprobs": 2}]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_marked_and_its_mates_are_right(
    make: Make, options: dict[str, Any], bad: float
) -> None:
    logits = some_logits(4)
    alone = sample(logits[1:2], [make(seed=1, **options)])
    logits[2, 77] = bad
    found = Sampler().sample(logits.clone(), [make(seed=i, **options) for i in range(4)])
    assert [one.is_finite for one in found] == [True, True, False, True]
    assert found[1].token == alone[0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 1e-4, 1e9])
def test_extreme_temperatures_are_harmless(make: Make, temperature: float) -> None:
    logits = some_logits(seed=9)
    token = sample(logits, [make(temperature=temperature)])[0]
    assert 0 <= token < VOCAB
    if temperature < 1:
        assert token == logits.argmax()


def test_logprobs_are_of_the_unchanged_logits(make: Make) -> None:
    logits = some_logits(3, 49_152)
    choices = [
        make(temperature=0.0, top_logprobs=3, logit_bias={5: 100.0}),
        make(temperature=0.0),
        make(seed=3, top_logprobs=0, temperature=0.3, top_p=0.5),
    ]
    found = Sampler().sample(logits.clone(), choices)
    expected = logits.double().log_softmax(1)
    assert found[0].token == 5
    assert found[0].logprob == pytest.approx(float(expected[0, 5]), abs=1e-5)
    values, ids = expected[0].topk(3)
    assert [token for token, _ in found[0].top] == ids.tolist()
    assert [value for _, value in found[0].top] == pytest.approx(values.tolist(), abs=1e-5)
    assert found[2].logprob == pytest.approx(float(expected[2, found[2].token]), abs=1e-5)
    assert found[1].top == found[2].top == ()


def test_top_is_the_sorted_beginning_for_any_count() -> None:
    rows = some_logits(4, 49_152)
    for count in (1, 20, 64, 96, 512):
        values, ids = under_test._top(rows, count)
        assert torch.equal(values, rows.topk(count, 1).values)
        assert torch.equal(rows.gather(1, ids), values)


def test_a_grammar_binds_its_row_alone(shipped: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    matcher = GrammarCompiler(tokenizer, 49_152, [2]).compile('{"enum": ["yes", "no"]}')
    vocabulary = Vocabulary(tokenizer)
    ending = Ending(max_tokens=20, eos=frozenset([2]))
    texts: Counter[str] = Counter()
    for seed in range(12):
        bound = Choice(vocabulary, [1], sampling=Sampling(), ending=ending, seed=seed, matcher=matcher.copy())
        free = Choice(vocabulary, [1], sampling=Sampling(temperature=0), ending=ending)
        text, reason = "", None
        while reason is None:
            logits = some_logits(2, 49_152, seed=seed)
            logits[1, 2] = -50.0
            best = int(logits[1].argmax())
            first, second = Sampler().sample(logits, [free, bound][::-1])
            assert second.token == best
            delta = bound.accept(first)
            text, reason = text + delta.text, delta.finish_reason
        texts[text] += 1
    assert set(texts) <= {'"yes"', '"no"'}
    assert len(texts) == 2
