"""The description is true: every route is in it, and fuzzing finds no answer that it does not name."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

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


def schema_of(name: str) -> Any:
    service = FakeService(CARDS[name])
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(service))


for _name in CARDS:
    _schema = schema_of(_name)

    @_schema.parametrize()
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    def _fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    globals()[f"test_fuzzing_{_name}_finds_no_answer_that_is_not_described"] = _fuzz
