"""The table of statuses is whole, and every dialect writes errors its own way."""

import inspect

import httpx
import pytest

from deployments.core import errors
from serve_app.http.errors import STATUS, headers_of, status_of
from tests.http_fakes import FakeService, client_of

CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServingError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_class_has_its_own_row(kind: type[errors.ServingError]) -> None:
    assert kind in STATUS


def test_a_subclass_of_a_user_takes_its_parents_row() -> None:
    class TooBlurred(errors.InvalidItem):
        pass

    assert status_of(TooBlurred("sharpen it")) == 422


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if STATUS[kind] == 503])
def test_every_503_says_when_to_come_back(kind: type[errors.Refusal]) -> None:
    assert headers_of(kind("later", retry_after_s=7)) == [(b"retry-after", b"7")]
    assert headers_of(kind("later")) == [(b"retry-after", b"1")]


async def post(path: str, body: object) -> httpx.Response:
    async with client_of(FakeService()) as client:
        return await client.post(path, json=body, headers={"x-request-id": "r1"})


async def test_native_errors_have_type_message_param_and_request_id() -> None:
    answer = await post("/predict", {"inputs": []})
    assert answer.json() == {
        "error": {
            "type": "malformed_request",
            "message": "`inputs` is empty; send at least one item",
            "param": "inputs",
            "request_id": "r1",
        }
    }


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/nothing", "/v1"])
async def test_errors_under_v1_have_openais_fields(path: str) -> None:
    error = (await post(path, {})).json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v2/models/embed/infer", "/v2/nothing", "/v2", "/v2/models/x"])
async def test_errors_under_v2_are_one_string(path: str) -> None:
    body = (await post(path, {})).json()
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)


async def test_a_500_under_v2_names_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["bug"]}
    answer = await post("/v2/models/embed/infer", {"inputs": [tensor]})
    assert answer.status_code == 500
    assert "request_id r1" in answer.json()["error"]
    assert "secret detail" in caplog.text
