"""The description is true: every route is in it, and fuzzing finds no answer that it does not name."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.core.contract import Limits, ModelCard
from serve_app.http.app import make_app
from tests.http_fakes import PAIR_CARD, PICTURE_CARD, TEXT_CARD, FakeService, client_of

CARDS = {card.name: card for card in (TEXT_CARD, PICTURE_CARD, PAIR_CARD)}


@pytest.mark.parametrize("name", CARDS)
async def test_every_route_is_described_with_its_method(name: str) -> None:
    async with client_of(FakeService(CARDS[name])) as client:
        described = (await client.get("/openapi.json")).json()
        routes = (await client.get("")).json()["routes"]
    assert described["servers"] == [{"url": "/app"}]
    methods = {
        path: sorted(key.upper() for key in item if key in ("get", "post"))
        for path, item in described["paths"].items()
    }
    assert methods == routes | {"/": ["GET"]}


async def test_limits_changed_in_place_hold_at_once_and_are_described() -> None:
    service = FakeService()
    async with client_of(service) as client:
        service._limits = Limits(max_items_per_request=1, max_body_bytes=100)
        described = (await client.get("/openapi.json")).json()
        refused = await client.post("/predict", json={"inputs": ["a", "b"]})
        too_big = await client.post("/predict", json={"inputs": ["a" * 100]})
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["inputs"]["maxItems"] == 1
    assert (refused.status_code, too_big.status_code) == (413, 413)


async def test_the_docs_page_stands_alone() -> None:
    async with client_of(FakeService()) as client:
        page = await client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for loaded in ("src=", "href=", "http://", "https://", "innerHTML"):
        assert loaded not in page.text


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# No schema can say that a tensor's `data` has as many elements as its `shape`.
CHECKS_WITHOUT_TENSORS = [*CHECKS, positive_data_acceptance]
REFUSALS = ["400", "404", "405", "408", "413", "415", "422"]


def schema_of(card: ModelCard) -> Any:
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(FakeService(card)))
    schema.config.checks.negative_data_rejection.expected_statuses = REFUSALS
    return schema


def fuzz(case: Any) -> None:
    is_infer = case.path.endswith("/infer")
    case.call_and_validate(checks=CHECKS if is_infer else CHECKS_WITHOUT_TENSORS)


# Made at import: schemathesis's lazy fixtures do not work with pytest 9.
TEXT = schema_of(TEXT_CARD).exclude(path_regex="versions")  # same handlers, fuzzed once
PICTURE = schema_of(PICTURE_CARD).include(path=["/predict", "/v2/models/{name}/infer"])
PAIR = schema_of(PAIR_CARD).include(path=["/v2/models/{name}/infer"])


@TEXT.parametrize()
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzing_a_text_model_finds_only_described_answers(case: Any) -> None:
    fuzz(case)


@PICTURE.parametrize()
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzing_a_picture_model_finds_only_described_answers(case: Any) -> None:
    fuzz(case)


@PAIR.parametrize()
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzing_a_model_of_two_inputs_finds_only_described_answers(case: Any) -> None:
    fuzz(case)
