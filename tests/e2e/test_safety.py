"""The audit's verdict on the real server: made at the first start, applied, shown."""

import re

import requests

from tests.e2e.conftest import Server


def test_a_users_model_is_audited_before_it_serves_and_the_verdict_is_shown(server: Server) -> None:
    stats = requests.get(f"{server.url}/doubler/stats", timeout=30).json()
    assert stats["safety"]["mode"] == "shared"
    assert stats["safety"]["verdict"] == "safe as tested"
    assert "overlaps" in stats["safety"]["reason"]
    said = server.log.read_text()
    assert re.search(r"doubler: no verdict on its model is stored: it is audited first", said)
    assert "safe as tested: one instance, 1 thread" in said


def test_a_named_mode_needs_no_audit(server: Server) -> None:
    safety = requests.get(f"{server.url}/fickle/stats", timeout=30).json()["safety"]
    assert (safety["mode"], safety["verdict"]) == ("shared", "not audited")


def test_memory_is_in_the_figures(server: Server) -> None:
    memory = requests.get(f"{server.url}/doubler/stats", timeout=30).json()["memory"]
    assert 0 < memory["used_bytes"] < memory["budget_bytes"]
    assert (memory["out_of_memory"], memory["learned_max_cost"]) == (0, None)
