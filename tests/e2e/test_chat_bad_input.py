"""What nobody should send to /chat: the right status, a sentence that says what to change, life goes on."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.e2e.conftest import Server

CHAT, COMPLETIONS = "/chat/v1/chat/completions", "/chat/v1/completions"
USER = {"role": "user", "content": "Hi"}


def post(server: Server, path: str, body: bytes | str, **headers: str) -> requests.Response:
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    data = body.encode() if isinstance(body, str) else body
    return requests.post(server.url + path, data=data, headers=headers, timeout=90)


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.emptied("chat")


@pytest.fixture(scope="module", autouse=True)
def the_next_request_is_served(server: Server) -> Iterator[None]:
    yield
    fine = {"model": "chat", "messages": [USER], "max_tokens": 2}
    assert post(server, CHAT, json.dumps(fine)).status_code == 200


def refused(answer: requests.Response, status: int, *, param: str | None = None, says: str = "") -> None:
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["type"] == "invalid_request_error"
    assert says.lower() in error["message"].lower(), error
    if param is not None:
        assert error["param"] == param, error
    assert "Traceback" not in answer.text


def with_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"messages": []}, 400, "messages", "send at least one"),
        ({"messages": "Hi"}, 400, "messages", "array"),
        ({"messages": None}, 400, "messages", ""),
        ({"messages": [USER, "Hi"]}, 400, "messages[1]", "object with role and content"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages[0].role", "user, assistant"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, 400, "messages[0].role", "not supported"),
        ({"messages": [{"role": 1, "content": "Hi"}]}, 400, "messages[0].role", "one of"),
        ({"messages": [{"content": "Hi"}]}, 400, "messages[0].role", "one of"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "must be a string"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "must be a string"),
        ({"messages": [{**USER, "image": "x"}]}, 400, "messages[0].image", "allowed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content[0].type",
            "text only",
        ),
        ({"messages": [USER] * 4097}, 413, "messages", "leave out the oldest"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "messages", "reduce the length"),
        ({"max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": -1}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "ask for fewer"),
        ({"max_tokens": 10**30}, 400, "max_tokens", ""),
        ({"max_tokens": 1.5}, 400, "max_tokens", "int"),
        ({"max_tokens": "ten"}, 400, "max_tokens", "int"),
        ({"max_tokens": True}, 400, "max_tokens", "int"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "one of them"),
        ({"temperature": -1}, 400, "temperature", ">= 0"),
        ({"temperature": 10**9}, 400, "temperature", "<= 2"),
        ({"temperature": "hot"}, 400, "temperature", "float"),
        ({"top_p": 0}, 400, "top_p", "> 0"),
        ({"top_p": 2}, 400, "top_p", "<= 1"),
        ({"top_k": -2}, 400, "top_k", ">= -1"),
        ({"min_p": 1.5}, 400, "min_p", "<= 1"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty", "<= 2"),
        ({"presence_penalty": -3}, 400, "presence_penalty", ">= -2"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "> 0"),
        ({"stop": [f"s{i}" for i in range(100)]}, 400, "stop", "<= 16"),
        ({"stop": ""}, 400, "stop", ">= 1"),
        ({"stop": ["a", ""]}, 400, "stop[1]", ">= 1"),
        ({"stop": "x" * 1025}, 400, "stop", "<= 1024"),
        ({"stop": 5}, 400, "stop", "str"),
        ({"n": 0}, 400, "n", ">= 1"),
        ({"n": 1000}, 400, "n", "<= 16"),
        ({"n": "two"}, 400, "n", "int"),
        ({"seed": 2**64}, 400, "seed", ""),
        ({"logit_bias": {"word": 1}}, 400, "logit_bias", "token ids"),
        ({"logit_bias": {"999999999": 1}}, 422, "logit_bias", "token ids go from 0"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias[...]", "<= 100"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "<= 20"),
        ({"model": "gpt-4"}, 404, "model", "chat"),
        ({"model": None}, 400, "model", "str"),
        ({"stream": "yes"}, 400, "stream", "bool"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "leave it out"),
        ({"max_token": 5}, 400, "max_token", "unknown field"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", ""),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "schema"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_field_of_a_chat_is_named(
    server: Server, fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    asked = {"model": "chat", "messages": [USER]} | fields
    refused(post(server, CHAT, json.dumps(asked)), status, param=param, says=says)


@pytest.mark.parametrize(
    ("schema", "status", "says"),
    [
        ("a string", 400, "must be a JSON object"),
        ({"type": "object", "description": "x" * (1 << 20)}, 400, "at most 65536"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, 422, "schema"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, 422, "satisf"),
        (False, 400, "must be a JSON object"),
        ({"not": {}}, 422, "schema"),
        ({"type": "no such type"}, 422, "schema"),
        ({"$ref": "#/nowhere"}, 422, "schema"),
        ({"type": "string", "pattern": "("}, 422, "schema"),
    ],
    ids=lambda value: "" if isinstance(value, int) and value > 1 else str(value)[:60],
)
def test_a_schema_that_can_not_be_followed_is_refused(
    server: Server, schema: Any, status: int, says: str
) -> None:
    asked = {"model": "chat", "messages": [USER]} | with_schema(schema)
    answer = post(server, CHAT, json.dumps(asked))
    refused(answer, status, says=says)
    assert answer.json()["error"]["param"].startswith("response_format")


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"prompt": ""}, 422, "prompt", "empty"),
        ({"prompt": []}, 400, "prompt", "none of the lists empty"),
        ({"prompt": [[]]}, 400, "prompt", "none of the lists empty"),
        ({"prompt": 5}, 400, "prompt", "must be a string"),
        ({"prompt": ["a", 5]}, 400, "prompt", "must be a string"),
        ({"prompt": [1.5]}, 400, "prompt", "token ids"),
        ({"prompt": [-1]}, 400, "prompt", "token ids"),
        ({"prompt": [10**9]}, 422, "prompt", "token ids go from 0"),
        ({"prompt": ["a"] * 300}, 413, "prompt", "256"),
        ({"n": 16, "prompt": ["a"] * 100}, 413, "prompt", "256"),
        ({"prompt": "word " * 20_000}, 400, "prompt", "reduce the length"),
        ({"prompt": "Hi", "max_tokens": 10**9}, 400, "max_tokens", "ask for fewer"),
        ({"prompt": "Hi", "logprobs": 6}, 400, "logprobs", "<= 5"),
        ({"prompt": "Hi", "echo": True}, 400, "echo", "leave it out"),
        ({"prompt": "Hi", "suffix": "x"}, 400, "suffix", "leave it out"),
        ({"prompt": "Hi", "best_of": 2}, 400, "best_of", "leave it out"),
        ({}, 400, None, "required field `prompt`"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_field_of_a_completion_is_named(
    server: Server, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    refused(post(server, COMPLETIONS, json.dumps({"model": "chat"} | fields)), status, param=param, says=says)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        "[]",
        '{"model": "chat", "messages": [',
        '{"temperature": NaN, "model": "chat", "messages": [{"role": "user", "content": "Hi"}]}',
        '{"temperature": Infinity, "model": "chat", "messages": [{"role": "user", "content": "Hi"}]}',
        '{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "chat", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        '{"model": "chat", "messages": ' + "[" * 10_000 + "]" * 10_000 + "}",
    ],
    ids=lambda body: repr(body[:60]),
)
def test_malformed_json_is_400(server: Server, body: str | bytes) -> None:
    refused(post(server, CHAT, body), 400)


def test_a_hundred_thousand_messages_are_refused_by_their_count(server: Server) -> None:
    asked = {"model": "chat", "messages": [USER] * 100_000}
    refused(post(server, CHAT, json.dumps(asked)), 413, says="send fewer messages")


def test_a_body_over_the_limit_and_a_wrong_content_type_are_refused(server: Server) -> None:
    asked = {"model": "chat", "messages": [{"role": "user", "content": "x" * (17 << 20)}]}
    refused(post(server, CHAT, json.dumps(asked)), 413, says="max_body_bytes")
    refused(post(server, CHAT, "{}", Content_Type="text/plain"), 415, says="application/json")


def test_a_megabyte_of_text_is_over_the_context_and_holds_nobody_up(server: Server) -> None:
    asked = {"model": "chat", "messages": [{"role": "user", "content": "a\u0301 " * 400_000}]}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(post, server, CHAT, json.dumps(asked))
        waits_s = []
        while not asking.done():
            began = time.monotonic()
            requests.get(f"{server.url}/chat/healthz", timeout=30)
            waits_s.append(time.monotonic() - began)
    refused(asking.result(), 400, says="maximum context length")
    assert asking.result().json()["error"]["code"] == "context_length_exceeded"
    assert max(waits_s) < 1.0, "the event loop stood still"


def test_a_prompt_that_fits_without_its_output_is_told_both_sizes(server: Server) -> None:
    context = server.stats("chat")["limits"]["context_tokens"]
    asked = {"model": "chat", "prompt": "Hi there", "max_tokens": context}
    answer = post(server, COMPLETIONS, json.dumps(asked))
    refused(answer, 400, param="max_tokens", says="in the completion")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_stream_that_never_begins_has_its_own_status(server: Server) -> None:
    for fields, status in (({"top_p": 2}, 400), ({"model": "x"}, 404), (with_schema({"type": "?"}), 422)):
        asked = {"model": "chat", "messages": [USER], "stream": True} | fields
        answer = post(server, CHAT, json.dumps(asked))
        refused(answer, status)
        assert answer.headers["content-type"].startswith("application/json")


def test_work_that_can_not_begin_in_time_is_504(server: Server) -> None:
    asked = {"model": "chat", "prompt": "Hi", "max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}
    with requests.post(server.url + COMPLETIONS, json=asked, stream=True, timeout=90) as running:
        assert running.status_code == 200  # all slots are taken
        late = {"model": "chat", "messages": [USER]}
        answer = post(server, CHAT, json.dumps(late), X_Request_Timeout_Ms="50")
        assert answer.status_code in (503, 504), answer.text
        assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("", "empty"),
        ([], "at least one message"),
        (7, "expected a string"),
        (None, "expected a string"),
        ({}, '"messages" or "prompt"'),
        ({"prompt": "a", "messages": [USER]}, '"messages" or "prompt"'),
        ({"prompt": 5}, "expected a string"),
        ({"prompt": ""}, "empty"),
        ({"messages": "a"}, "list of messages"),
        ([{"role": "wizard", "content": "a"}], "unknown role"),
        ([{"role": "user"}], "role"),
        ([{"role": "user", "content": 5}], "string"),
        ([5], "object"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "ten"}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": 1e9}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 100}, "stop"),
        ({"prompt": "a", "max_token": 5}, "unknown field"),
    ],
    ids=str,
)
def test_an_item_that_is_no_request_is_422(server: Server, item: Any, says: str) -> None:
    answer = post(server, "/chat/predict", json.dumps({"inputs": [item]}))
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["error"]["message"]


def test_an_item_over_the_context_is_400_and_fails_alone(server: Server) -> None:
    good = {"prompt": "The capital of France is", "max_tokens": 2}
    for too_long in ({"prompt": "a", "max_tokens": 10**9}, "word " * 20_000):
        answer = post(server, "/chat/predict", json.dumps({"inputs": [good, too_long, good]}))
        body = answer.json()
        assert answer.status_code == 400
        assert [(error["index"], error["type"]) for error in body["errors"]] == [
            (1, "context_length_exceeded")
        ]
        assert [output is None for output in body["outputs"]] == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"datatype": "FP32", "data": [1.5]}, "BYTES"),
        ({"name": "text"}, "prompt"),
        ({"shape": [2]}, ""),
        ({"data": [5]}, ""),
        ({"data": [""]}, "empty"),
        ({"shape": [0], "data": []}, ""),
    ],
    ids=str,
)
def test_oip_refuses_what_is_no_prompt(server: Server, changes: dict[str, Any], says: str) -> None:
    tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["Hi"], **changes}
    answer = post(server, "/chat/v2/models/chat/infer", json.dumps({"inputs": [tensor]}))
    assert answer.status_code in (400, 422), answer.text
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("GET", COMPLETIONS, 405),
        ("POST", "/chat/v1/embeddings", 404),
        ("POST", "/chat/stream", 404),
        ("GET", "/chat/ws", 404),
        ("GET", "/chat/v1/models/gpt-4", 404),
        ("POST", "/embed/v1/chat/completions", 404),
        ("POST", "/embed/stream", 404),
    ],
)
def test_methods_and_paths(server: Server, method: str, path: str, status: int) -> None:
    answer = requests.request(method, server.url + path, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
