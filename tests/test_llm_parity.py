"""The real SmolLM2 in the real engine says, token for token, what transformers' greedy decoding says.

transformers reads each text once, as a whole: its best token after every prefix is what its `generate`
would have chosen there. Where its two best logits are closer than TIE, either is right.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from deployments.core.contract import Limits, RequestOptions
from deployments.core.generation import GenerationRequest, Sampling
from deployments.models.smollm2 import SmolLM2, shipped
from deployments.runtime.continuous import ContinuousService
from deployments.runtime.fronts import LanguageFront, Place

TIE = 1e-3
TOPICS = ["the sea", "bread", "a train", "winter", "a small dog", "glass", "the moon", "a bridge"]
ASKS = ["Write a story about", "Explain to a child", "List five facts about", "Write a poem on"]
SYSTEM = "You are a careful assistant. You answer in plain words, in short sentences, and never rhyme. " * 3


@asynccontextmanager
async def serving(**limits: object) -> AsyncIterator[ContinuousService]:
    service = ContinuousService("chat", LanguageFront(SmolLM2()), Limits(**limits))  # type: ignore[arg-type]
    await service.start(Place("cpu"))
    try:
        yield service
    finally:
        await service.close()


def request(index: int, tokens: int) -> GenerationRequest:
    question = f"{ASKS[index % 4]} {TOPICS[index // 4]}."
    messages = [{"role": "user", "content": question}]
    if index % 2:  # half of them share a long prefix, so the cache is used
        messages.insert(0, {"role": "system", "content": SYSTEM})
    sampling = Sampling(temperature=0.0, top_logprobs=2)
    return GenerationRequest(messages=messages, max_tokens=tokens, sampling=sampling, ignore_eos=True)


async def generate(
    service: ContinuousService, asked: GenerationRequest, after_s: float = 0.0
) -> tuple[list[int], int, list[float]]:
    """(all tokens, of which prompt, logprobs of the generated)."""
    await asyncio.sleep(after_s)
    (generation,) = await service.generate([asked], RequestOptions(timeout_ms=600_000))
    stream = generation.choices[0]
    logprobs: list[float] = []
    while deltas := await stream.read():
        logprobs += [logprob.logprob for delta in deltas for logprob in delta.logprobs]
    sequence = stream.sequence  # type: ignore[attr-defined]
    return list(sequence.tokens), generation.prompt_tokens, logprobs


class Reference:
    """transformers' model on the same weights."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(shipped(), dtype=torch.float32).eval()

    @torch.inference_mode()
    def check(self, tokens: list[int], prompt: int, logprobs: list[float]) -> int:
        """Assert that every generated token is right; how many of them were ties."""
        logits = self._model(torch.tensor([tokens])).logits[0, prompt - 1 : -1]  # [n, V]
        best = logits.topk(2).values
        given = torch.tensor(tokens[prompt:])
        chosen = logits.gather(1, given[:, None])[:, 0]
        assert (best[:, 0] - chosen).max() < TIE, "another token than transformers'"
        expected = logits.log_softmax(-1).gather(1, given[:, None])[:, 0]
        assert len(logprobs) == len(given)
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-3
        return int((best[:, 0] - best[:, 1] < TIE).sum())


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [(6, 32), pytest.param(32, 64, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
async def test_greedy_text_is_transformers_whatever_the_crowd_does(prompts: int, tokens: int) -> None:
    """Random arrivals, chunked prompts, preemptions, cache hits, in one run."""
    rng = random.Random(7)
    block_bytes = 16 * 30 * 2 * 3 * 64 * 4
    blocks = 8 + prompts  # far less than they need together
    async with serving(max_sequences=12, max_tokens_in_step=48, kv_bytes=blocks * block_bytes) as service:
        jobs = [generate(service, request(i, tokens), rng.uniform(0, 1)) for i in range(prompts)]
        texts = list(await asyncio.gather(*jobs))
        # The crowd may have evicted all; what just ended is in the cache for sure.
        texts += [await generate(service, request(1, 8)) for _ in range(2)]
        stats = service.stats()["engine"]
    assert stats["preemptions"] > 0
    assert stats["cached_units"] > 0
    assert stats["blocks_used"] == 0
    reference = Reference()
    ties = sum(reference.check(*text) for text in texts)
    print(f"ties leaned on: {ties} of {prompts * tokens} tokens; preemptions: {stats['preemptions']}")
    assert ties <= 8


async def test_a_seeded_request_gives_the_same_text_alone_and_in_a_crowd() -> None:
    def seeded() -> GenerationRequest:
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        return GenerationRequest(messages=messages, max_tokens=12, sampling=Sampling(seed=11), n=2)

    async def texts(service: ContinuousService) -> list[str]:
        (generation,) = await service.generate([seeded()], RequestOptions())
        found = []
        for choice in generation.choices:
            text = ""
            while deltas := await choice.read():
                text += "".join(delta.text for delta in deltas)
            found.append(text)
        return found

    async with serving(max_sequences=8) as service:
        alone = await texts(service)
        crowd = [asyncio.ensure_future(generate(service, request(i, 40))) for i in range(4)]
        await asyncio.sleep(0.3)
        assert await texts(service) == alone
        assert alone[0] != alone[1], "each choice has a seed of its own"
        for other in crowd:
            other.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)


async def test_a_reader_that_leaves_frees_everything_before_the_next_step() -> None:
    async with serving(max_sequences=4) as service:
        (generation,) = await service.generate([request(1, 64)], RequestOptions())
        await generation.choices[0].read()
        assert service.stats()["engine"]["blocks_used"] > 0
        generation.close()
        stats = service.stats()
        assert (stats["engine"]["blocks_used"], stats["engine"]["running"], stats["in_flight"]) == (0, 0, 0)
        assert stats["totals"]["cancelled"] == 1
