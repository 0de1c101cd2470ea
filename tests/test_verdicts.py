"""What the terminal says of a model's safety, from its /stats."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from serve_app.verdicts import verdict_lines


@pytest.fixture
def said(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The lines for these stats."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(request.param).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield verdict_lines(f"http://127.0.0.1:{server.server_port}/app")
        server.shutdown()


def stats(limits: dict[str, int], **safety: str) -> dict[str, Any]:
    return {"limits": limits, "slots": {"total": 4}, "safety": {"mode": "shared", "reason": "why", **safety}}


@pytest.mark.parametrize(
    "said", [stats({"max_batch_size": 8}, verdict="unsafe", warning="the audit says pool")], indirect=True
)
def test_evidence_against_a_named_mode_is_a_warning(said: list[str]) -> None:
    assert said == ["unsafe: one instance, 4 threads (why)", "WARNING: the audit says pool"]


@pytest.mark.parametrize(
    "said",
    [stats({"max_batch_size": 8}, verdict="safe as tested", variants="int8: 1.65 times as fast")],
    indirect=True,
)
def test_what_a_variant_gains_is_said(said: list[str]) -> None:
    assert said == ["safe as tested: one instance, 4 threads", "optimised: int8: 1.65 times as fast"]


@pytest.mark.parametrize("said", [stats({"max_sequences": 8}, verdict="safe as tested")], indirect=True)
def test_steps_share_one_thread(said: list[str]) -> None:
    assert said == ["safe as tested: all steps on one thread"]


@pytest.mark.parametrize("said", [{"limits": {}}], indirect=True)
def test_who_says_nothing_is_not_spoken_for(said: list[str]) -> None:
    assert said == []
