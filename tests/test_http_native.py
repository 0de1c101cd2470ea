"""POST /predict and the routes around it, against a fake service."""

import base64
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from deployments.core.errors import ModelFailed
from serve_app import haproxy_config
from serve_app.http import exchange
from tests.http_fakes import PICTURE_CARD, FakeService, client_of, vector_of


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


async def predict(client: httpx.AsyncClient, inputs: Any, **more: Any) -> httpx.Response:
    return await client.post("/predict", json={"inputs": inputs, **more})


async def test_outputs_come_in_the_order_of_inputs(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["b", "a"])
    assert answer.status_code == 200
    assert answer.json() == {"outputs": [vector_of("b"), vector_of("a")]}
    assert answer.headers["server-timing"] == 'queue;dur=1.2, batch;desc="17", model;dur=8.4'


async def test_one_bad_item_fails_alone_with_its_place(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["a", 7, "late"])
    body = answer.json()
    assert answer.status_code == 422
    assert body["outputs"] == [vector_of("a"), None, None]
    assert [(e["index"], e["type"]) for e in body["errors"]] == [
        (1, "invalid_item"),
        (2, "deadline_exceeded"),
    ]
    assert body["error"]["param"] == "inputs[1]"


async def test_a_late_item_is_504(client: httpx.AsyncClient) -> None:
    assert (await predict(client, ["late", 7])).status_code == 504


async def test_a_warning_does_not_fail_the_item(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["a", "long"])
    assert answer.status_code == 200
    assert answer.json()["warnings"] == [{"index": 1, "type": "truncated", "message": "cut at 256 tokens"}]


async def test_an_output_that_is_no_json_fails_alone(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["a", "object"])
    assert answer.status_code == 500
    assert answer.json()["outputs"] == [vector_of("a"), None]
    assert answer.json()["errors"][0]["type"] == "model_contract_error"


async def test_a_model_failure_tells_the_log_and_not_the_caller(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = await client.post("/predict", json={"inputs": ["poison"]}, headers={"x-request-id": "abc-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["request_id"] == "abc-1"
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert "request_id=abc-1" in caplog.text


async def test_a_bug_of_ours_is_500_without_details(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = await predict(client, ["bug"])
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


async def test_no_room_is_503_with_the_measured_retry_after(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["a", "full"])
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "overloaded"
    assert "outputs" not in answer.json()


async def test_a_stopping_server_is_503_with_retry_after(client: httpx.AsyncClient) -> None:
    answer = await predict(client, ["stopping"])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_options_reach_the_service(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(
        "/predict",
        json={"inputs": ["a"], "parameters": {"timeout_ms": 500, "priority": -3}},
        headers={"x-request-id": "r1"},
    )
    options = service.calls[0][1]
    assert (options.timeout_ms, options.priority, options.request_id) == (500, -3, "r1")
    assert options.body_bytes > 0


@pytest.mark.parametrize(("header", "parameter", "result"), [("300", 500, 300), ("800", 500, 500)])
async def test_of_two_timeouts_the_shorter_holds(
    client: httpx.AsyncClient, service: FakeService, header: str, parameter: int, result: int
) -> None:
    await client.post(
        "/predict",
        json={"inputs": ["a"], "parameters": {"timeout_ms": parameter}},
        headers={"x-request-timeout-ms": header},
    )
    assert service.calls[0][1].timeout_ms == result


async def test_a_timeout_over_a_day_counts_as_a_day(client: httpx.AsyncClient, service: FakeService) -> None:
    await predict(client, ["a"], parameters={"timeout_ms": 1e300})
    assert service.calls[0][1].timeout_ms == 86_400_000


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1_000", "soon", "1e999", ""])
async def test_a_bad_timeout_header_is_400(client: httpx.AsyncClient, value: str) -> None:
    answer = await client.post("/predict", json={"inputs": ["a"]}, headers={"x-request-timeout-ms": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Request-Timeout-Ms"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "empty"),
        ({"inputs": "a text"}, "expected `array`, got `str`"),
        ({"inputs": None}, "got `null`"),
        ([], "expected `object`"),
        ({"inputs": ["a"], "input": 1}, "unknown field 'input'; allowed: inputs, parameters"),
        (
            {"inputs": ["a"], "parameters": {"prio": 1}},
            "unknown field 'prio' in `parameters`; allowed: timeout_ms, priority",
        ),
        ({"inputs": ["a"], "parameters": {"priority": 11}}, "-10 to 10"),
        ({"inputs": ["a"], "parameters": {"priority": 0.5}}, "integer"),
        ({"inputs": ["a"], "parameters": {"priority": True}}, "bool"),
        ({"inputs": ["a"], "parameters": {"timeout_ms": 0}}, "over 0"),
        ({"inputs": ["a"], "parameters": {"timeout_ms": "1"}}, "str"),
        ({"inputs": ["a"], "parameters": []}, "array"),
    ],
)
async def test_a_request_of_the_wrong_shape_is_400_and_says_what_to_change(
    client: httpx.AsyncClient, service: FakeService, body: Any, says: str
) -> None:
    answer = await client.post("/predict", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "malformed_request"
    assert not service.calls


async def test_a_million_items_are_413_before_any_work(service: FakeService) -> None:
    service._limits = type(service.limits)(max_body_bytes=16 << 20)
    async with client_of(service) as client:
        answer = await client.post(
            "/predict",
            content=b'{"inputs":[' + b",".join([b"0"] * 10**6) + b"]}",
            headers={"content-type": "application/json"},
        )
    assert answer.status_code == 413
    assert "max_items_per_request, 256" in answer.json()["error"]["message"]
    assert not service.calls


async def test_as_many_items_as_allowed_pass(client: httpx.AsyncClient) -> None:
    assert (await predict(client, ["a"] * 8)).status_code == 200
    assert (await predict(client, ["a"] * 9)).status_code == 413


@pytest.mark.parametrize("text", ["", "\0", "é" * 100_000, "\U0010ffff", "\N{GRINNING FACE}"])
async def test_any_text_that_json_can_hold_passes(client: httpx.AsyncClient, text: str) -> None:
    assert (await predict(client, [text])).json() == {"outputs": [vector_of(text)]}


async def test_a_pair_of_escaped_surrogates_is_one_character(client: httpx.AsyncClient) -> None:
    answer = await client.post("/predict", content=rb'{"inputs":["\ud83d\ude00"]}')
    assert answer.json() == {"outputs": [vector_of("\N{GRINNING FACE}")]}


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
async def test_other_methods_are_405_and_named(
    client: httpx.AsyncClient, service: FakeService, method: str
) -> None:
    answer = await client.request(method, "/predict")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert answer.json()["error"]["type"] == "method_not_allowed"
    assert service.counted == [(405, "/predict")]


async def test_head_is_taken_where_get_is(client: httpx.AsyncClient) -> None:
    answer = await client.head("/healthz")
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await client.post("/healthz")).headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["", "/"])
async def test_the_prefix_itself_shows_the_routes(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"http://test/app{path}")
    assert answer.json()["routes"]["/predict"] == ["POST"]
    assert answer.json()["name"] == "embed"


async def test_an_unknown_route_is_404_and_names_the_routes(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    answer = await client.post("/predicts")
    assert answer.status_code == 404
    assert "/predict" in answer.json()["error"]["message"]
    assert service.counted == [(404, "unknown")]


async def test_a_trailing_slash_is_another_route(client: httpx.AsyncClient) -> None:
    assert (await client.post("/predict/")).status_code == 404


async def test_healthz_and_stats_answer(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "alive"}
    assert (await client.get("/stats")).json() == {"requests": 0}


async def test_every_answer_is_counted_once(client: httpx.AsyncClient, service: FakeService) -> None:
    await predict(client, ["a"])
    await predict(client, ["poison"])
    await client.post("/predict", content=b"x", headers={"content-type": "text/plain"})
    assert service.counted == [(200, "/predict"), (500, "/predict"), (415, "/predict")]


async def test_the_request_id_header_is_left_to_a_middleware_unless_asked_for(
    service: FakeService,
) -> None:
    async with client_of(service) as client:
        assert "x-request-id" not in (await predict(client, ["a"])).headers
    async with client_of(service, adds_request_id=True) as client:
        given = await client.get("/healthz", headers={"x-request-id": "mine"})
        assert given.headers.get_list("x-request-id") == ["mine"]
        assert len((await client.get("/healthz")).headers["x-request-id"]) == 32


@pytest.mark.parametrize("given", ["x" * 129, "a\x01b", "caf\xe9", "", "a\tb", 'a type="x"', "a,b", "a\\b"])
async def test_a_request_id_unfit_for_logs_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/nowhere", headers={"x-request-id": given.encode("latin-1")})
    assert len(answer.json()["error"]["request_id"]) == 32


@pytest.mark.parametrize("given", ["x" * 128, "a", "Root=1-67891233-abcdef:x/y+z_9.=="])
async def test_a_fit_request_id_stays(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/nowhere", headers={"x-request-id": given})
    assert answer.json()["error"]["request_id"] == given


def test_the_proxy_knows_the_same_request_ids() -> None:
    assert f"'^{exchange._REQUEST_ID.pattern.decode()}$'" == haproxy_config.FIT_ID


def test_the_log_keeps_both_ends_of_a_long_detail(caplog: pytest.LogCaptureFixture) -> None:
    error = ModelFailed("it failed")
    error.detail = "first" + "x" * 1_000_000 + "last"
    exchange.log_failure(error, route="/predict", request_id="r1")
    said = caplog.records[0].getMessage()
    assert len(said) < exchange.MAX_DETAIL_CHARS + 200
    assert "first" in said
    assert said.endswith("last")


async def test_an_image_passes_raw_in_json_and_in_a_form() -> None:
    service = FakeService(PICTURE_CARD)
    image = b"\xff\xd8 not really"
    async with client_of(service) as client:
        raw = await client.post("/predict", content=image, headers={"content-type": "image/jpeg; q=1"})
        as_json = await predict(client, [{"image_b64": base64.b64encode(image).decode()}])
        form = await client.post("/predict", files=[("f", ("a.jpg", image)), ("f", ("b.png", b"!"))])
    assert raw.json() == as_json.json()
    assert form.json()["outputs"][0] == raw.json()["outputs"][0]
    assert service.calls[2][0] == [image, b"!"]
