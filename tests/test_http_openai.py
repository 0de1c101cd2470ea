"""OpenAI's embeddings API against a fake service."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.http_fakes import PICTURE_CARD, FakeService, client_of, vector_of


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(FakeService()) as client:
        yield client


async def embed(client: httpx.AsyncClient, value: Any, **more: Any) -> httpx.Response:
    body = {"input": value, "model": "embed"} | more
    return await client.post("/v1/embeddings", json=body)


async def test_one_text_or_a_list_gives_one_vector_each(client: httpx.AsyncClient) -> None:
    one = (await embed(client, "two words")).json()
    many = (await embed(client, ["two words", "b"], encoding_format="float", user="u")).json()
    assert one["data"] == [{"object": "embedding", "index": 0, "embedding": vector_of("two words")}]
    assert [entry["index"] for entry in many["data"]] == [0, 1]
    assert many["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (many["object"], many["model"]) == ("list", "embed")


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    answer = await embed(client, "a", encoding_format="base64", dimensions=4)
    raw = base64.b64decode(answer.json()["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == vector_of("a")


async def test_warnings_are_beside_the_data(client: httpx.AsyncClient) -> None:
    assert (await embed(client, ["a", "long"])).json()["warnings"][0]["index"] == 1


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"input": []}, "input", "a string or a list of strings"),
        ({"input": None}, "input", "a string or a list of strings"),
        ({"input": [1, 2, 3]}, "input", "tokens of another model"),
        ({"input": [[1, 2], [3]]}, "input", "tokens of another model"),
        ({"encoding_format": "hex"}, "encoding_format", "float or base64"),
        ({"dimensions": 3}, "dimensions", "must be 4"),
        ({"dimension": 4}, "dimension", "unknown field 'dimension'; allowed: input, model"),
    ],
)
async def test_what_is_not_offered_is_400_and_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, says: str
) -> None:
    answer = await embed(client, "a", **change)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert says in error["message"]


async def test_too_many_texts_are_413(client: httpx.AsyncClient) -> None:
    assert (await embed(client, ["a"] * 9)).status_code == 413


async def test_a_big_body_is_read_and_its_texts_are_counted(client: httpx.AsyncClient) -> None:
    text = "two words" + " " * 100_000
    assert (await embed(client, [text] * 8)).status_code == 200
    assert (await embed(client, text * 4)).status_code == 200
    assert (await embed(client, [text] * 9)).status_code == 413


async def test_another_model_is_404_model_not_found(client: httpx.AsyncClient) -> None:
    for answer in (await embed(client, "a", model="x"), await client.get("/v1/models/x")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_one_bad_item_fails_the_list_with_the_first_error(client: httpx.AsyncClient) -> None:
    answer = await embed(client, ["a", "late", "poison"])
    assert answer.status_code == 504
    assert answer.json()["error"]["param"] == "inputs[1]"
    assert answer.json()["error"]["type"] == "server_error"


async def test_the_model_is_listed(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["embed"]
    assert (await client.get("/v1/models/embed")).json() == listed[0]


async def test_a_model_without_vectors_has_no_openai_routes() -> None:
    async with client_of(FakeService(PICTURE_CARD)) as client:
        answer = await client.post("/v1/embeddings", json={})
    assert answer.status_code == 404
    assert "/v1" not in answer.json()["error"]["message"]
