"""Each application's own description, fuzzed over real HTTP: no answer breaks, and the server lives on.

The fuzzing against fakes (tests/test_http_openapi.py) checks answers against their schemas; here proxy,
Ray and real models stand between.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.e2e.conftest import Server

EXAMPLES = 12
"""For each operation: a request takes 5 to 100 ms, and all applications together at most 45 s."""
BUDGET_S = 8.0
"""For each application: what is left after that is skipped, on a slow machine."""
REFUSED = (503, 504)
"""No room, or too late: documented, and honest on a machine that is busy with other tests."""


def operations(url: str) -> Iterator[Any]:
    """As the server describes them itself; version 1 has the same handlers."""
    described = requests.get(f"{url}/openapi.json", timeout=30)
    assert described.status_code == 200
    schema = schemathesis.openapi.from_dict(described.json()).exclude(path_regex="versions")
    schema.config.update(base_url=url)
    for found in schema.get_all_operations():
        yield found.ok()


def shorten(case: Any) -> None:
    """A text may be as long as the context; here a few tokens do, unless the case is about their number."""
    if isinstance(case.body, dict) and "/v1/" in case.path:
        limits = [case.body.get(name) for name in ("max_tokens", "max_completion_tokens")]
        if limits == [None, None]:
            case.body["max_tokens"] = 2
        elif all(type(limit) is int and limit > 2 for limit in limits if limit is not None):
            case.body |= {name: 2 for name in ("max_tokens", "max_completion_tokens") if name in case.body}


def fuzz(operation: Any, *, until: float, leaves: bool) -> int:
    """Requests of one operation, generated from its schema, good and bad; returns how many were answered.

    leaves: the client does not wait for a long answer (a text of 256 tokens).
    """
    sent = 0

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    def each(case: Any) -> None:
        nonlocal sent
        if time.monotonic() > until:
            return
        shorten(case)
        try:
            answer = case.call(timeout=3 if leaves else 30)
        except requests.exceptions.ReadTimeout:
            assert leaves
            return
        sent += 1
        assert answer.status_code < 500 or answer.status_code in REFUSED, (
            f"{case.method} {case.path} -> {answer.status_code}: {answer.text[:500]}\n{case.body!r:.500}"
        )

    each()
    return sent


@pytest.mark.parametrize("app", ["embed", "doubler", "classify", "chat", "vad", "follower"])
def test_fuzzing_an_application_over_http_finds_no_fault_of_ours(server: Server, app: str) -> None:
    url = f"{server.url}/{app}"
    until = time.monotonic() + BUDGET_S
    sent = {f"{op.method} {op.path}": fuzz(op, until=until, leaves=app == "chat") for op in operations(url)}
    assert sent["post /predict"] > 0
    assert requests.get(f"{url}/healthz", timeout=30).status_code == 200
    if app in ("chat", "vad", "follower"):
        server.emptied(app)
