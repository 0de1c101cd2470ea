"""OpenAI's own client, and raw sockets, against a fake language model behind a real server."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import openai
import pydantic
import pytest

from deployments.core.contract import Limits
from serve_app.http.app import make_app
from tests.http_fakes import FakeTextService
from tests.test_http_clients import serving, under_prefixes

CHAT = "/v1/chat/completions"
TEXT = "Grüße an alle 🌍 hier"


@pytest.fixture
def service() -> FakeTextService:
    return FakeTextService(Limits(idle_timeout_s=0.2))


@pytest.fixture
def address(service: FakeTextService) -> Iterator[str]:
    with serving(under_prefixes({"/chat": make_app(service, adds_request_id=True)})) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/chat/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"http://{address}/chat/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def soon(is_true: Callable[[], bool]) -> bool:
    """Whether it comes true within 10 s: the server runs in another thread."""
    deadline = time.monotonic() + 10
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_true()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openai_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat", messages=user(TEXT), max_completion_tokens=3, logprobs=True, top_logprobs=2, seed=1
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Grüße an alle", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert choice.logprobs is not None
    assert len(choice.logprobs.content[1].top_logprobs) == 2
    assert [model.id for model in client.models.list()] == ["chat"]


def test_openai_client_goes_on_with_its_own_answer(client: openai.OpenAI, service: FakeTextService) -> None:
    answer = client.chat.completions.create(model="chat", messages=user("a"))
    history = [*user("a"), answer.choices[0].message, *user("b")]
    client.chat.completions.create(model="chat", messages=history)
    assert service.asked_for[1].messages[1] == {"role": "assistant", "content": "a"}


def test_openai_client_streams_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat", messages=user(TEXT), stream=True, n=2, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT, TEXT]
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 10
    assert chunk.usage.prompt_tokens_details.cached_tokens == 2


def test_openai_client_completes_and_streams_a_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="chat", prompt=[TEXT, "a b"], n=2, logprobs=1, stop=["x"])
    assert [choice.text for choice in whole.choices] == [TEXT, TEXT, "a b", "a b"]
    assert whole.choices[0].logprobs.text_offset == [0, 5, 8, 13, 15]
    stream = client.completions.create(model="chat", prompt=TEXT, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_openai_client_reads_structured_output(client: openai.OpenAI, service: FakeTextService) -> None:
    class Size(pydantic.BaseModel):
        size: int

    answer = client.chat.completions.parse(model="chat", messages=user('{"size": 3}'), response_format=Size)
    assert answer.choices[0].message.parsed == Size(size=3)
    grammar = service.asked_for[0].grammar
    assert grammar is not None
    assert json.loads(grammar.json_schema)["properties"]["size"]["type"] == "integer"


async def test_async_openai_client_streams_many_at_once(async_client: openai.AsyncOpenAI) -> None:
    async def one(text: str) -> str:
        stream = await async_client.chat.completions.create(model="chat", messages=user(text), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = [f"{TEXT} {i}" for i in range(20)]
    assert await asyncio.gather(*map(one, texts)) == texts


def test_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt", messages=user("a"), stream=stream)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="chat", messages=user("too long"), stream=stream)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as range_error:
            client.chat.completions.create(model="chat", messages=user("a"), temperature=-1, stream=stream)
        assert range_error.value.param == "temperature"
        with pytest.raises(openai.InternalServerError) as full:
            client.chat.completions.create(model="chat", messages=user("full"), stream=stream)
        assert full.value.response.headers["retry-after"] == "3"


def test_openai_client_raises_the_error_of_a_stream_that_breaks(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="chat", messages=user("break later"), stream=True)
    with pytest.raises(openai.APIError, match="failed on this sequence"):
        list(stream)


def test_openai_client_that_leaves_a_stream_frees_its_sequences(
    client: openai.OpenAI, service: FakeTextService
) -> None:
    stream = client.chat.completions.create(model="chat", messages=user("endless"), stream=True, n=2)
    for _ in range(3):
        next(stream)
    stream.close()
    assert soon(lambda: all(choice.closed for choice in service.choices))
    assert soon(lambda: service.counted == [(499, CHAT)])


def test_a_client_that_leaves_before_the_first_byte_frees_its_sequence(
    client: openai.OpenAI, service: FakeTextService
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="chat", messages=user("hang"), stream=stream, timeout=0.2)
    assert soon(lambda: [choice.closed for choice in service.choices] == [1, 1])
    assert soon(lambda: service.counted == [(499, CHAT)] * 2)


def post(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /chat{CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_a_slow_reader_is_cut_off_and_the_others_go_on(
    address: str, client: openai.OpenAI, service: FakeTextService
) -> None:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(post({"model": "chat", "messages": user("endless"), "stream": True}))
        assert soon(lambda: bool(service.choices))
        answer = client.chat.completions.create(model="chat", messages=user("a b"))
        assert answer.choices[0].message.content == "a b"
        assert soon(lambda: service.choices[0].closed > 0)
        assert soon(lambda: (499, CHAT) in service.counted)
        reads = service.choices[0].reads
    assert reads < 100_000  # what the sockets hold, by far not the million there is
    assert service.choices[0].reads == reads
