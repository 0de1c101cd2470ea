"""Failures, deadlines, overload and metrics on the real server."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from tests.e2e.conftest import Server


def ask(server: Server, *items: dict[str, object], app: str = "fickle", **headers: str) -> requests.Response:
    return requests.post(
        f"{server.url}/{app}/predict",
        json={"inputs": items},
        headers={k.replace("_", "-"): v for k, v in headers.items()},
        timeout=60,
    )


def settled(server: Server) -> dict[str, object]:
    """The replica's figures once nothing is in flight any more."""
    for _ in range(100):
        stats = requests.get(f"{server.url}/fickle/stats", timeout=30).json()
        if stats["in_flight"] == 0:
            return dict(stats)
        time.sleep(0.1)
    raise AssertionError(f"work is left: {stats}")


def test_innocents_of_a_poisoned_batch_get_their_answers(server: Server) -> None:
    poison = [{"raise": name} for name in ("ValueError", "SystemExit", "KeyboardInterrupt")]

    def one(i: int) -> tuple[int, object]:
        item = poison[i % 3] if i % 20 == 0 else {"value": i, "sleep_ms": 1}
        answer = ask(server, item)
        return answer.status_code, answer.json()["outputs"][0]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(400)))
    assert all(a == ((500, None) if i % 20 == 0 else (200, i)) for i, a in enumerate(answers))
    settled(server)


def test_a_model_error_tells_its_request_id_and_nothing_of_its_inside(server: Server) -> None:
    answer = ask(server, {"raise": "ValueError"}, X_Request_Id="find-me")
    error = answer.json()["error"]
    assert answer.status_code == 500
    assert error["request_id"] == "find-me"
    assert "own text" not in answer.text


def test_a_wrong_output_count_is_the_models_error(server: Server) -> None:
    answer = ask(server, {"raise": "count"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "model_contract_error"


def test_what_can_not_begin_in_time_is_refused_or_expires(server: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        slow = pool.submit(ask, server, {"sleep_ms": 700})
        time.sleep(0.2)
        late = ask(server, {"value": 1}, X_Request_Timeout_Ms="100")
        assert late.status_code in (503, 504)
        assert slow.result().status_code == 200


def test_a_client_that_leaves_takes_its_item_along(server: Server) -> None:
    before = settled(server)["totals"]["items"]  # type: ignore[index]
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(ask, server, {"sleep_ms": 1500})
        time.sleep(0.2)

        def leave(i: int) -> bool:
            try:
                requests.post(f"{server.url}/fickle/predict", json={"inputs": [{"value": i}]}, timeout=0.2)
            except requests.exceptions.ReadTimeout:
                return True
            return False

        assert all(pool.map(leave, range(7)))
        assert slow.result().status_code == 200
    stats = settled(server)
    assert stats["totals"]["items"] == before + 1  # type: ignore[index]


def test_a_full_queue_answers_503_at_once_and_says_when_to_come_back(server: Server) -> None:
    def one(i: int) -> tuple[int, float, str | None]:
        answer = ask(server, {"value": i, "sleep_ms": 50})
        return answer.status_code, answer.elapsed.total_seconds(), answer.headers.get("Retry-After")

    with ThreadPoolExecutor(160) as pool:
        answers = list(pool.map(one, range(160)))
    refused = [a for a in answers if a[0] == 503]
    assert {a[0] for a in answers} == {200, 503}
    assert len(refused) >= 40  # 64 may wait, 16 run
    assert all(a[2] is not None and int(a[2]) >= 1 for a in refused)
    settled(server)


def test_a_list_that_fits_but_not_now_is_refused_whole(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, server, *[{"value": i, "sleep_ms": 20} for i in range(60)])
        time.sleep(0.3)
        second = ask(server, *[{"value": i} for i in range(40)])
        assert second.status_code == 503
        assert "outputs" not in second.json()
        assert first.result().json()["outputs"] == list(range(60))


def test_metrics_are_in_rays_prometheus_endpoint(server: Server) -> None:
    folder = Path(f"/tmp/brimful-{os.getuid()}") / str(server.port)
    discovery = next(folder.rglob("prom_metrics_service_discovery.json"))
    wanted = {
        "queue_wait_seconds", "model_seconds", "batch_items", "batch_cost", "padding_share",
        "instances", "memory_bytes", "requests_total", "queue_items", "queue_cost", "slot_busy_share",
        "ttft_seconds", "inter_token_seconds", "step_seconds", "step_units", "step_sequences",
        "sequences_running", "sequences_waiting", "streams_open", "kv_used_share", "prefix_cached_share",
    }  # fmt: skip
    asked = {"model": "chat", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
    requests.post(f"{server.url}/chat/v1/completions", json=asked, timeout=60)
    requests.post(f"{server.url}/embed/predict", json={"inputs": ["a", "b"]}, timeout=60)
    missing = wanted
    for _ in range(30):
        targets = [t for entry in json.loads(discovery.read_text()) for t in entry["targets"]]
        text = "".join(requests.get(f"http://{t}/metrics", timeout=10).text for t in targets)
        missing = {name for name in wanted if f"ray_brimful_{name}" not in text}
        if not missing:
            return
        time.sleep(1.0)
    raise AssertionError(f"not scraped: {missing}")
