"""OpenAI's client and others chat with the real model; clients that leave, whenever, leave nothing behind."""

import asyncio
import itertools
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
import requests
import tritonclient.http as triton

from tests.e2e.conftest import Server

QUESTION = "What is the capital of France?"  # its answers are short
CAPITAL = [{"role": "user", "content": QUESTION}]
STORY = {"model": "chat", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}
EMOJI = "ü漢👩‍👧🌍"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/chat/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.url}/chat/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.emptied("chat")


# OpenAI's client


def test_openai_client_gets_the_right_answer_and_what_it_cost(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat", messages=CAPITAL, temperature=0, max_completion_tokens=40
    )
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens > 10
    assert 0 < usage.completion_tokens < 40
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["chat"]


def test_openai_client_streams_the_same_text_and_its_usage_last(client: openai.OpenAI) -> None:
    asked = {"model": "chat", "messages": CAPITAL, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert sum(bool(c.choices[0].delta.content) for c in chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens


async def test_a_seeded_text_is_the_same_alone_and_in_a_crowd(async_client: openai.AsyncOpenAI) -> None:
    async def ask(i: int) -> str:
        stream = await async_client.chat.completions.create(
            model="chat",
            messages=[{"role": "user", "content": f"Tell me about the number {i}."}],
            max_completion_tokens=10,
            seed=i,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    alone = [await ask(i) for i in range(2)]
    crowd = await asyncio.gather(*map(ask, range(10)))  # more than there are slots
    assert crowd[:2] == alone
    assert len(set(crowd)) == 10


def test_choices_differ_by_their_seeds_and_are_counted_once(client: openai.OpenAI) -> None:
    asked = {**STORY, "temperature": 1.0, "n": 3, "seed": 7, "max_tokens": 8}
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in again.choices] == texts
    assert first.usage.completion_tokens == 24
    assert first.usage.prompt_tokens < 10


def test_streamed_choices_come_mixed_and_whole(client: openai.OpenAI) -> None:
    asked = {**STORY, "temperature": 1.0, "n": 2, "seed": 7, "max_tokens": 8}
    whole = client.completions.create(**asked)
    texts, reasons = ["", ""], {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {0: "length", 1: "length"}


def test_each_prompt_of_a_list_has_its_text_and_token_ids_are_a_prompt(client: openai.OpenAI) -> None:
    one = client.completions.create(**STORY)
    two = client.completions.create(**{**STORY, "prompt": ["Once upon a time", "The capital of France is"]})
    assert two.choices[0].text == one.choices[0].text
    assert "Paris" in two.choices[1].text
    ids = client.completions.create(**{**STORY, "prompt": [5, 6, 7, 8], "max_tokens": 2})
    assert ids.usage.prompt_tokens == 4


class City(pydantic.BaseModel):
    name: Literal["Paris", "Berlin"]
    is_capital: bool
    tens: list[Literal[10, 20]] = pydantic.Field(min_length=2, max_length=2)


def test_structured_output_parses_into_a_users_class(client: openai.OpenAI) -> None:
    asked = {"model": "chat", "messages": CAPITAL, "temperature": 1.0, "max_completion_tokens": 80}
    city = client.chat.completions.parse(**asked, response_format=City).choices[0].message.parsed
    assert isinstance(city, City)
    any_object = client.chat.completions.create(
        **{**asked, "max_completion_tokens": 8}, response_format={"type": "json_object"}
    )
    assert any_object.choices[0].message.content.startswith("{")


def test_structured_output_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="chat", messages=CAPITAL, response_format=City, max_completion_tokens=80
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, City)


def test_a_stop_string_over_token_borders_ends_the_text_before_it(client: openai.OpenAI) -> None:
    full = client.completions.create(**STORY, logprobs=0).choices[0]
    tokens = full.logprobs.tokens
    stop = next(a[-2:] + b[:2] for a, b in itertools.pairwise(tokens[4:]) if len(a) > 2 and len(b) > 2)
    expected = full.text[: full.text.index(stop)]
    cut = client.completions.create(**STORY, stop=["never seen", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    streamed = [c.choices[0] for c in client.completions.create(**STORY, stop=stop, stream=True)]
    assert "".join(choice.text for choice in streamed) == expected
    assert streamed[-1].finish_reason == "stop"


def test_logprobs_of_a_chat_tell_its_tokens_and_what_else_might_have_come(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="chat", messages=CAPITAL, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    ).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 6
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy takes the best
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-6)
        assert bytes(token.bytes).decode() == token.token
        assert token.logprob <= 0


def test_logprobs_of_a_completion_tell_where_each_token_begins(client: openai.OpenAI) -> None:
    choice = client.completions.create(**STORY, logprobs=2).choices[0]
    logprobs = choice.logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


def test_a_prompt_that_was_seen_before_comes_from_the_cache(client: openai.OpenAI) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    asked = {"model": "chat", "messages": [{"role": "user", "content": words}], "max_tokens": 1}
    first, second = (client.chat.completions.create(**asked).usage for _ in range(2))
    before, cached = (usage.prompt_tokens_details.cached_tokens for usage in (first, second))
    assert before < cached < second.prompt_tokens
    assert cached > second.prompt_tokens / 2


def test_a_chat_without_max_tokens_may_use_all_the_context_there_is(
    server: Server, client: openai.OpenAI
) -> None:
    """The KV memory holds less than the model's own context here."""
    assert server.stats("chat")["limits"]["context_tokens"] < 8192
    with client.chat.completions.create(model="chat", messages=CAPITAL, stream=True) as stream:
        assert next(stream).choices[0].delta.role == "assistant"


def test_special_tokens_in_a_users_text_are_text(client: openai.OpenAI) -> None:
    def prompt_tokens(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="chat", messages=messages, max_tokens=1)
        return int(answer.usage.prompt_tokens)

    assert prompt_tokens("a<|im_end|>b") >= prompt_tokens("ab") + 4


def test_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=CAPITAL, stream=stream)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="chat", prompt="word " * 20_000, stream=stream)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as much:
            client.chat.completions.create(model="chat", messages=CAPITAL, max_tokens=10**9, stream=stream)
        assert much.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="chat", messages=CAPITAL, temperature=-1, stream=stream)
        assert wrong.value.param == "temperature"


# The bytes of a stream


def asked_for_emoji(**more: Any) -> dict[str, Any]:
    """The only text that fits is EMOJI in quotes: many tokens hold a part of a character."""
    schema = {"name": "emoji", "schema": {"const": EMOJI}}
    return {
        "model": "chat",
        "messages": CAPITAL,
        "max_tokens": 100,
        "response_format": {"type": "json_schema", "json_schema": schema},
        **more,
    }


def test_every_event_of_a_stream_is_valid_utf_8(server: Server) -> None:
    answer = requests.post(
        f"{server.url}/chat/v1/chat/completions",
        json=asked_for_emoji(stream=True, stream_options={"include_usage": True}),
        stream=True,
        timeout=60,
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = b"".join(answer.iter_content(1)).split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ").decode("utf-8")) for event in events]
    text = "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
    assert json.loads(text) == EMOJI
    assert "\ufffd" not in text
    assert chunks[-1]["usage"]["completion_tokens"] > len(EMOJI)  # so characters were cut


def test_logprobs_carry_the_bytes_of_half_a_character(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked_for_emoji(logprobs=True)).choices[0]
    assert json.loads(choice.message.content) == EMOJI
    text = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert text.decode().startswith(choice.message.content)


def test_emoji_that_the_model_goes_on_with_stay_whole(client: openai.OpenAI) -> None:
    asked = {**STORY, "prompt": "🎉🌍🎉🌍🎉🌍🎉🌍🎉🌍🎉🌍", "max_tokens": 8}
    whole = client.completions.create(**asked).choices[0].text
    streamed = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))
    assert any(ord(character) > 0xFFFF for character in whole)
    assert streamed == whole


# Other clients


def predict(server: Server, *items: Any) -> requests.Response:
    return requests.post(f"{server.url}/chat/predict", json={"inputs": items}, timeout=110)


def test_requests_predicts_a_string_a_list_of_messages_and_an_object(server: Server) -> None:
    exact = {"temperature": 0, "max_tokens": 40}
    answer = predict(
        server,
        "Say hi.",
        CAPITAL,
        {"messages": CAPITAL, **exact},
        {"prompt": "The capital of France is", **exact},
    )
    assert answer.status_code == 200, answer.text
    outputs = answer.json()["outputs"]
    assert len(outputs) == 4
    for output in outputs:
        assert output["finish_reason"] in ("stop", "length")
        usage = output["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "Paris" in outputs[2]["text"]
    assert "Paris" in outputs[3]["text"]


def test_curl_predicts(server: Server) -> None:
    body = json.dumps({"inputs": [{"messages": CAPITAL, "temperature": 0}]})
    out = subprocess.run(
        ["curl", "-sS", f"{server.url}/chat/predict", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        check=True,
        timeout=90,
    ).stdout
    (output,) = json.loads(out)["outputs"]
    assert "Paris" in output["text"]


def test_tritonclient_chats(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}/chat", network_timeout=110) as client:
        assert client.is_model_ready("chat")
        metadata = client.get_model_metadata("chat")
        assert metadata["inputs"] == [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]
        assert metadata["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        prompt = triton.InferInput("prompt", [2], "BYTES")
        prompt.set_data_from_numpy(np.array([QUESTION, QUESTION], dtype=object))
        texts = client.infer("chat", [prompt]).as_numpy("text")
    assert texts.shape == (2,)
    assert all(text.decode().strip() for text in texts)


# Clients that leave


def sent(server: Server, **fields: Any) -> socket.socket:
    """A connection on which a request was sent, and nothing read."""
    body = json.dumps({"model": "chat", "ignore_eos": True, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(
        b"POST /chat/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_before_the_first_byte_frees_its_sequence(server: Server, stream: bool) -> None:
    left = server.stats("chat")["totals"]["cancelled"]
    connection = sent(server, prompt="Once", max_tokens=1000, stream=stream)
    server.reaches("chat", "running", 1)
    connection.close()
    stats = server.emptied("chat")
    assert stats["totals"]["cancelled"] == left + 1
    assert stats["totals"]["requests"]["499"] >= 1


def test_a_client_that_leaves_in_prefill_frees_what_was_computed(server: Server) -> None:
    before = server.stats("chat")["engine"]
    prompt = [100 + 7 * i % 40_000 for i in range(5000)]  # token ids: 20 steps of 256
    with sent(server, prompt=prompt, max_tokens=1, stream=True):
        server.reaches("chat", "steps", before["steps"] + 1)
    after = server.emptied("chat")["engine"]
    assert 0 < after["units"] - before["units"] < len(prompt)


def test_a_client_that_leaves_in_decode_frees_all_its_choices(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        **{**STORY, "max_tokens": 1000, "n": 4}, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(8):
        next(stream)
    assert server.stats("chat")["engine"]["running"] == 4
    stream.close()
    server.emptied("chat")


def test_a_client_that_leaves_while_it_waits_never_runs(server: Server) -> None:
    with sent(server, prompt="Once", max_tokens=1000, n=8, stream=True):
        server.reaches("chat", "running", 8)
        begun = server.stats("chat")["totals"]["begun"]
        waiting = sent(server, prompt="Twice", max_tokens=5, stream=True)
        server.reaches("chat", "waiting", 1)
        waiting.close()
        while server.stats("chat")["engine"]["waiting"]:
            pass
        assert server.stats("chat")["engine"]["running"] == 8
    assert server.emptied("chat")["totals"]["begun"] == begun


async def test_clients_that_vanish_at_random_points_leave_the_others_their_texts(
    server: Server, async_client: openai.AsyncOpenAI
) -> None:
    async def ask(i: int, stays: bool) -> str:
        asked = {**STORY, "prompt": f"{i} times", "max_tokens": 16}
        text, seen = "", 0
        async with await async_client.completions.create(**asked, stream=True) as stream:
            async for chunk in stream:
                text, seen = text + chunk.choices[0].text, seen + 1
                if not stays and seen > i % 7:
                    break
        return text

    alone = await ask(3, True)
    texts = await asyncio.gather(*(ask(i, i % 8 == 3) for i in range(24)))
    assert texts[3] == alone
    assert await asyncio.to_thread(server.emptied, "chat")
