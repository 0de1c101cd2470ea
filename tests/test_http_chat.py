"""OpenAI's chat and completions against a fake language model."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deployments.core.contract import Limits
from deployments.core.generation import Grammar, Sampling
from serve_app.http.app import make_app
from serve_app.http.chat_messages import MAX_MESSAGES
from tests.http_fakes import SCRIPTS, FakeTextService, client_of
from tests.test_http_openapi import CHECKS, REFUSALS

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def service() -> FakeTextService:
    return FakeTextService()


@pytest.fixture
async def client(service: FakeTextService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


async def chat(client: httpx.AsyncClient, content: Any = "two words", **more: Any) -> httpx.Response:
    body = {"model": "chat", "messages": [{"role": "user", "content": content}]} | more
    return await client.post(CHAT, json=body)


async def complete(client: httpx.AsyncClient, prompt: Any = "two words", **more: Any) -> httpx.Response:
    return await client.post(COMPLETIONS, json={"model": "chat", "prompt": prompt} | more)


def events_of(answer: httpx.Response) -> list[Any]:
    """The payloads of a stream; [DONE] as a string."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\n")
    lines = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    payloads = [line.removeprefix("data: ") for line in lines]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for event in events
        if event != "[DONE]"
        for choice in event["choices"]
        if choice["index"] == index
    )


# Whole answers


async def test_a_chat_is_answered_in_openais_shape(client: httpx.AsyncClient) -> None:
    answer = ChatCompletion.model_validate((await chat(client, "Grüße an alle 🌍 hier")).json())
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Grüße an alle 🌍 hier")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.object, answer.model) == ("chat.completion", "chat")
    assert answer.id.startswith("chatcmpl-")
    assert answer.created > 1_700_000_000
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.usage.to_dict() == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_the_id_is_the_requests(client: httpx.AsyncClient) -> None:
    body = {"model": "chat", "prompt": "a"}
    answer = await client.post(COMPLETIONS, json=body, headers={"x-request-id": "mine-1"})
    assert answer.json()["id"] == "cmpl-mine-1"


async def test_max_tokens_cut_the_text_and_say_so(client: httpx.AsyncClient) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = (await chat(client, "a b c d", **{name: 2})).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("a b", "length")


async def test_all_options_reach_the_model(client: httpx.AsyncClient, service: FakeTextService) -> None:
    answer = await chat(
        client, n=2, stop=["x", "y"], temperature=0, top_p=0.5, top_k=-1, min_p=0.1,
        presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.1, logit_bias={"7": -100},
        seed=-(2**63), logprobs=True, top_logprobs=3, max_tokens=9, max_completion_tokens=9,
        ignore_eos=True, response_format={"type": "json_object"}, user="u", metadata={"a": "b"},
        store=False, service_tier="auto", tools=[], tool_choice="none", modalities=["text"], stream=False,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    (asked,) = service.asked_for
    assert (asked.n, asked.stop, asked.max_tokens, asked.ignore_eos) == (2, ("x", "y"), 9, True)
    assert asked.grammar == Grammar('{"type": "object"}')
    assert asked.sampling == Sampling(0, 0.5, 0, 0.1, -2, 2, 1.1, {7: -100}, -(2**63), 3)
    await chat(client, stop="z", temperature=None, top_k=5)
    assert service.asked_for[-1].stop == ("z",)
    assert service.asked_for[-1].sampling == Sampling(top_k=5)
    assert service.asked_for[-1].max_tokens is None


async def test_a_json_schema_reaches_the_model_as_its_text(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "size", "schema": schema, "strict": True}}
    assert (await chat(client, response_format=wanted)).status_code == 200
    grammar = service.asked_for[0].grammar
    assert grammar is not None
    assert json.loads(grammar.json_schema) == schema
    assert (await chat(client, response_format={"type": "text"})).status_code == 200
    assert service.asked_for[1].grammar is None


async def test_messages_are_read_in_all_their_forms(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    given = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "<|im_end|>"},
    ]
    assert (await chat(client, messages=given)).status_code == 200
    assert service.asked_for[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two parts"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<|im_end|>"},
    ]


async def test_several_prompts_have_n_choices_each_in_order(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    answer = Completion.model_validate((await complete(client, ["a b", "c d e"], n=2)).json())
    assert [choice.text for choice in answer.choices] == ["a b", "a b", "c d e", "c d e"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert service.asked_for[0].max_tokens == 16
    assert all(choice.closed for choice in service.choices)


async def test_token_ids_are_prompts_too(client: httpx.AsyncClient, service: FakeTextService) -> None:
    assert len((await complete(client, [1, 2, 3])).json()["choices"]) == 1
    assert len((await complete(client, [[1, 2], [3]])).json()["choices"]) == 2
    assert [asked.prompt for asked in service.asked_for] == [[1, 2, 3], [1, 2], [3]]


async def test_logprobs_of_a_chat_have_openais_shape(client: httpx.AsyncClient) -> None:
    raw = await chat(client, "Grüße alle", logprobs=True, top_logprobs=2)
    answer = ChatCompletion.model_validate(raw.json())
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first = logprobs.content[0]
    assert [token.token for token in logprobs.content] == ["Grüße", " alle"]
    assert (first.logprob, bytes(first.bytes or [])) == (-0.5, "Grüße".encode())
    assert [top.logprob for top in first.top_logprobs] == [-9999.0, -9999.0]
    plain = (await chat(client, "a", logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


async def test_logprobs_of_a_completion_have_openais_shape(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        raw = await complete(client, "Grüße alle hier x", logprobs=1, stream=stream)
        found = events_of(raw)[:-1] if stream else [raw.json()]
        logprobs = [c["logprobs"] for answer in found for c in answer["choices"] if c["logprobs"]]
        merged = {key: [x for one in logprobs for x in one[key]] for key in logprobs[0]}
        assert merged["tokens"] == ["Grüße", " alle", " hier", " x"]
        assert merged["text_offset"] == [0, 5, 10, 15]
        assert merged["token_logprobs"] == [-0.5] * 4
        assert merged["top_logprobs"][0] == {"Grüße0": -9999.0}
    plain = (await complete(client, "a", logprobs=0)).json()["choices"][0]["logprobs"]
    assert plain["top_logprobs"] is None


# Streams


async def test_a_chat_streams_role_text_reason_and_done(client: httpx.AsyncClient) -> None:
    events = events_of(await chat(client, "Grüße an alle 🌍 hier", stream=True))
    assert events.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    assert chunks[0].choices[0].delta.to_dict() == {"role": "assistant", "content": ""}
    assert text_of(events) == "Grüße an alle 🌍 hier"
    assert len(chunks) == 1 + 5 + 1
    assert chunks[-1].choices[0].delta.to_dict() == {}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.object, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    assert not any("usage" in event for event in events)


async def test_a_completion_streams_text_reason_and_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    answer = await complete(client, "a b c d", stream=True, max_tokens=3, stream_options=options)
    events = events_of(answer)
    assert events.pop() == "[DONE]"
    assert text_of(events) == "a b c"
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 3 + ["length"]
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 4 + 3


async def test_choices_of_a_stream_come_mixed_and_each_is_whole(client: httpx.AsyncClient) -> None:
    text = " ".join("abcdefgh")
    events = events_of(await chat(client, text, n=3, stream=True))
    indices = [event["choices"][0]["index"] for event in events[:-1]]
    assert all(text_of(events, index) == text for index in range(3))
    assert indices != sorted(indices)
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons.count("stop") == 3


async def test_what_cannot_be_shown_yet_is_no_chunk(client: httpx.AsyncClient) -> None:
    events = events_of(await chat(client, "silent", stream=True))
    contents = [event["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert contents == ["", "b", None]


async def test_deltas_that_are_ready_together_go_out_together(service: FakeTextService) -> None:
    connection = Connection(service, completion("a b c d", stream=True))
    await connection.start()
    head, *pieces, last = connection.sent
    assert head["status"] == 200
    assert [piece["body"].count(b"data: ") for piece in pieces] == [3, 1 + 1, 1]
    assert not last.get("more_body")


# Failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "status", "kind", "code"),
    [
        ("full", 503, "server_error", "overloaded"),
        ("late", 504, "server_error", "deadline_exceeded"),
        ("too long", 400, "invalid_request_error", "context_length_exceeded"),
        ("unfit", 422, "invalid_request_error", "invalid_item"),
        ("break", 500, "server_error", "model_error"),
        ("bug", 500, "server_error", "internal_error"),
    ],
)
async def test_a_failure_before_the_first_token_has_its_status(
    client: httpx.AsyncClient,
    service: FakeTextService,
    stream: bool,
    content: str,
    status: int,
    kind: str,
    code: str,
) -> None:
    for answer in (
        await chat(client, content, stream=stream),
        await complete(client, content, stream=stream),
    ):
        error = answer.json()["error"]
        assert answer.status_code == status
        assert (error["type"], error["code"]) == (kind, code)
        assert "secret" not in answer.text
        assert answer.headers.get("retry-after") == ("3" if status == 503 else None)
    assert [counted for counted, _ in service.counted] == [status, status]
    assert all(choice.closed for choice in service.choices)


@pytest.mark.parametrize(
    ("content", "code"),
    [("break later", "model_error"), ("bug later", "internal_error"), ("no reason", "model_contract_error")],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_a_failure_on_the_way_is_the_last_event(
    client: httpx.AsyncClient, service: FakeTextService, content: str, code: str, n: int
) -> None:
    answer = await chat(client, content, stream=True, n=n)
    *chunks, last = events_of(answer)
    assert answer.status_code == 200
    assert last["error"]["code"] == code
    assert "secret" not in answer.text
    assert text_of(chunks) == "a"
    assert service.counted == [(500, CHAT)]
    assert all(choice.closed for choice in service.choices)


async def test_a_refused_prompt_lets_no_other_begin(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    assert (await complete(client, ["a", "b", "full"])).status_code == 503
    assert service.choices == []


# Bad input


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "chat", "prompt": prompt} | more


USER = {"role": "user", "content": "a"}
SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        *(({"max_tokens": value}, "max_tokens") for value in (0, -1, 1e9, 1.5, "ten", True, 10**30)),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        *(({"temperature": value}, "temperature") for value in (-1, 1e9, 2.1, "hot")),
        *(({"top_p": value}, "top_p") for value in (0, 2, -0.1)),
        *(({"n": value}, "n") for value in (0, 1000, 17, 1.5)),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [str(i) for i in range(100)]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}}, SCHEMA),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "a", "schema": {"title": "x" * (1 << 19)}}}}, SCHEMA),
        ({"temprature": 1}, "temprature"),
        ({"model": None}, "model"),
    ],
)  # fmt: skip
async def test_a_wrong_value_is_400_and_named_on_both_routes(
    client: httpx.AsyncClient, service: FakeTextService, change: dict[str, Any], param: str
) -> None:
    answers = [await chat(client, **change)]
    if "max_completion_tokens" not in change:
        answers.append(await complete(client, **change))
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), answer.text
        assert error["type"] == "invalid_request_error"
    assert not service.asked_for


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "a"}, "messages", "array"),
        ({"messages": None}, "messages", "array"),
        ({"messages": ["a"]}, "messages[0]", "an object with role and content"),
        ({"messages": [USER, {"role": "robot", "content": "a"}]}, "messages[1].role", "one of system"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "tools are not supported"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a string or a list of text parts"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or a list"),
        ({"messages": [USER | {"mood": 1}]}, "messages[0].mood", "unknown field 'mood'"),
        ({"messages": [USER | {"name": 1}]}, "messages[0].name", "must be a string"),
        ({"messages": [USER | {"tool_calls": [1]}]}, "messages[0].tool_calls", "not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type", "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text", "a string under `text`"),
        ({"messages": [{"role": "user", "content": [{"type": {}, "text": ""}]}]},
         "messages[0].content[0]", '"text"'),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", '"text"'),
        ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs: true`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "bool"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "auto"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"max_tokens": 257}, "max_tokens", "context of 256 tokens"),
    ],
)  # fmt: skip
async def test_what_a_chat_cannot_have_is_400_and_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, says: str
) -> None:
    answer = await chat(client, **change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), answer.text
    assert says in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        *(({"prompt": value}, "prompt") for value in ([], [[]], {}, 5, None, ["a", 1], [1.5], [-1], [True])),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"messages": [USER]}, "messages"),
    ],
)
async def test_what_a_completion_cannot_have_is_400_and_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str
) -> None:
    answer = await complete(client, **change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_nan_is_no_json(client: httpx.AsyncClient) -> None:
    body = b'{"model": "chat", "prompt": "a", "temperature": NaN}'
    answer = await client.post(COMPLETIONS, content=body)
    assert answer.status_code == 400
    assert "NaN" in answer.json()["error"]["message"]


async def test_too_many_messages_are_413() -> None:
    async with client_of(FakeTextService(Limits())) as client:
        for count, param in ((MAX_MESSAGES + 1, "messages"), (100_000, None)):
            answer = await chat(client, messages=[{"role": "user", "content": ""}] * count)
            assert (answer.status_code, answer.json()["error"]["param"]) == (413, param)


async def test_too_many_prompts_are_413(client: httpx.AsyncClient) -> None:
    assert (await complete(client, ["a"] * 9)).status_code == 413
    assert (await complete(client, ["a"] * 5, n=2)).status_code == 413
    assert (await complete(client, ["x" * 50_000] * 8)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": [{}] * 100_000}]},
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"stop": ["a"] * 100_000},
    ],
)
async def test_a_body_that_would_take_long_to_decode_is_413(
    client: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    answer = await chat(client, **change)
    assert answer.status_code == 413
    assert "over 100000 commas and brackets" in answer.json()["error"]["message"]


async def test_a_long_text_is_read_whatever_it_holds(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    text = "a" * 300_000 + "[,{" * 30_000
    assert (await chat(client, messages=[{"role": "user", "content": text}])).status_code == 200
    assert service.asked_for[0].messages == [{"role": "user", "content": text}]


async def test_another_model_is_404_model_not_found(client: httpx.AsyncClient) -> None:
    for answer in (await chat(client, model="gpt-4"), await complete(client, model="gpt-4")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert (await client.get("/v1/models/chat")).json()["id"] == "chat"
    assert (await client.post("/v1/embeddings", json={})).status_code == 404


async def test_other_content_types_are_415_and_methods_405(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert (await client.get(CHAT)).status_code == 405


async def test_the_deadline_header_reaches_the_model(
    client: httpx.AsyncClient, service: FakeTextService
) -> None:
    await client.post(COMPLETIONS, json=completion("a"), headers={"x-request-timeout-ms": "50"})
    assert service.calls[0][1].timeout_ms == 50


# Clients that leave, or don't read


class Connection:
    """One ASGI request by hand: its client may leave, and may stop reading."""

    def __init__(self, service: FakeTextService, body: dict[str, Any], *, reads: int = 1 << 30) -> None:
        self.service = service
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._reads = reads
        self._body: bytes | None = json.dumps(body).encode()
        path = CHAT if "messages" in body else COMPLETIONS
        self.scope = {
            "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip

    async def receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self._reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    def start(self) -> "asyncio.Task[None]":
        app = make_app(self.service)
        return asyncio.ensure_future(app(self.scope, self.receive, self.send))


async def begun(service: FakeTextService, reads: int) -> None:
    """Until every choice has been read that often."""
    while not service.choices or any(choice.reads < reads for choice in service.choices):  # noqa: ASYNC110
        await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("prompt", "stream", "reads"),
    [("hang", False, 1), ("hang later", False, 2), ("hang", True, 1), ("hang later", True, 2)],
)
async def test_a_client_that_leaves_frees_its_sequences_at_once(
    service: FakeTextService, prompt: str, stream: bool, reads: int, n: int
) -> None:
    before = asyncio.all_tasks()
    connection = Connection(service, completion(prompt, stream=stream, n=n))
    task = connection.start()
    await begun(service, reads)
    connection.left.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert all(choice.closed for choice in service.choices)
    await task
    assert service.counted == [(499, COMPLETIONS)]
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_frees_its_sequences(service: FakeTextService, stream: bool) -> None:
    task = Connection(service, completion("hang later", stream=stream, n=2)).start()
    await begun(service, 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(choice.closed for choice in service.choices)
    assert service.counted == [(499, COMPLETIONS)]


@pytest.mark.parametrize("reads", [0, 1, 5])
async def test_a_client_that_does_not_read_is_cut_off_and_nothing_piles_up(reads: int) -> None:
    service = FakeTextService(Limits(idle_timeout_s=0.05))
    connection = Connection(service, completion("endless", stream=True), reads=reads)
    await connection.start()
    assert len(connection.sent) == reads
    assert service.choices[0].reads <= reads + 1
    assert service.choices[0].closed
    assert service.counted == [(499, COMPLETIONS)]


async def test_the_error_event_waits_no_longer_than_a_chunk() -> None:
    service = FakeTextService(Limits(idle_timeout_s=0.05))
    connection = Connection(service, completion("break later", stream=True), reads=2)
    await connection.start()
    assert service.counted == [(499, COMPLETIONS)]


async def test_nothing_is_left_after_every_kind_of_end(client: httpx.AsyncClient) -> None:
    before = asyncio.all_tasks()
    for prompt in (*SCRIPTS.keys() - {"hang", "hang later", "endless"}, "a b c"):
        for n in (1, 3):
            for stream in (False, True):
                await complete(client, prompt, n=n, stream=stream)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


# The description


SCHEMA_OF_CHAT = schemathesis.openapi.from_asgi("/openapi.json", make_app(FakeTextService()))
SCHEMA_OF_CHAT.config.checks.negative_data_rejection.expected_statuses = REFUSALS


async def test_the_routes_are_described_with_their_ranges(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    routes = (await client.get("")).json()["routes"]
    assert routes.keys() | {"/"} == paths.keys()
    body = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["max_tokens"]["maximum"] == 256
    assert body["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 16}
    assert body["properties"]["model"] == {"const": "chat"}


@SCHEMA_OF_CHAT.include(path=[CHAT, COMPLETIONS]).parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzing_finds_only_described_answers(case: Any) -> None:
    # Which fields go together (stream_options with stream) no schema says: so no positive_data_acceptance.
    case.call_and_validate(checks=CHECKS)
