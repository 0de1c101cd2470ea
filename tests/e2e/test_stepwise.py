"""A user's own step-wise class in their own file: outputs stream, crowds change nothing, each fails alone."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.e2e.conftest import Server
from tests.user_models import Follower


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.emptied("follower")


@pytest.fixture(scope="module")
def model() -> Follower:
    model = Follower()
    model.load("cpu")
    return model


def alone(model: Follower, steps: int) -> list[float]:
    """What the class gives when it is stepped by hand."""
    states = {name: value.unsqueeze(0) for name, value in model.begin({"steps": steps}).items()}
    outputs: list[float] = []
    done = [False]
    with torch.no_grad():
        while not done[0]:
            states, output, done = model.step(states, [None])
            outputs += output
    return outputs


def stream(server: Server, request: Any) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    data = json.dumps(request)
    return requests.post(f"{server.url}/follower/stream", data=data, headers=headers, timeout=60)


def lines(answer: requests.Response) -> list[Any]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_stream_gives_what_the_class_gives_alone(server: Server, model: Follower) -> None:
    answer = stream(server, {"steps": 40})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert lines(answer) == pytest.approx(alone(model, 40), abs=1e-6)


def test_predict_gives_all_outputs_of_each_item(server: Server, model: Follower) -> None:
    items = [{"steps": 3}, {"steps": 20}, {"steps": 1}]
    answer = requests.post(f"{server.url}/follower/predict", json={"inputs": items}, timeout=60)
    assert answer.status_code == 200, answer.text
    for item, output in zip(items, answer.json()["outputs"], strict=True):
        assert output == pytest.approx(alone(model, item["steps"]), abs=1e-6)


def test_a_websocket_takes_the_request_as_its_first_message(server: Server, model: Follower) -> None:
    url = f"ws://127.0.0.1:{server.port}/follower/ws"
    with connect(url, proxy=None, open_timeout=60) as connection:
        connection.send('{"steps": 6}')
        outputs = [json.loads(message) for message in connection]
    assert connection.close_code == 1000
    assert outputs == pytest.approx(alone(model, 6), abs=1e-6)


def test_sequences_of_a_crowd_join_and_leave_and_get_their_own(server: Server, model: Follower) -> None:
    wanted = [1 + (7 * i) % 50 for i in range(40)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda steps: stream(server, {"steps": steps}), wanted))
    for steps, answer in zip(wanted, answers, strict=True):
        assert lines(answer) == pytest.approx(alone(model, steps), abs=1e-5)


@pytest.mark.parametrize("request_", [{"steps": 0}, {"steps": "3"}, {}, [], "three", None], ids=str)
def test_what_begin_refuses_is_422_with_the_users_own_words(server: Server, request_: Any) -> None:
    for answer in (
        stream(server, request_),
        requests.post(f"{server.url}/follower/predict", json={"inputs": [request_]}, timeout=60),
    ):
        assert answer.status_code == 422, answer.text
        assert 'expected {"steps": 1 to 1000}' in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ["", "{", "nonsense", '{"steps": 1} 2', "[" * 10_000])
def test_what_is_no_json_is_400(server: Server, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/follower/stream", data=body, headers=headers, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_binary_message_is_no_request(server: Server) -> None:
    url = f"ws://127.0.0.1:{server.port}/follower/ws"
    with connect(url, proxy=None, open_timeout=60) as connection:
        connection.send(b'{"steps": 6}')
        error = json.loads(connection.recv(timeout=30))["error"]
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=30)
    assert connection.close_code == 1008
    assert "text message" in error["message"]


@pytest.mark.parametrize("fault", ["fail_at", "nan_at"])
def test_a_sequence_that_fails_in_a_step_fails_alone(server: Server, model: Follower, fault: str) -> None:
    requests_ = [{"steps": 30, fault: 22} if i == 5 else {"steps": 30} for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda request: stream(server, request), requests_))
    *outputs, last = lines(answers.pop(5))
    assert outputs == pytest.approx(alone(model, 30)[:8], abs=1e-5)
    assert last["error"]["type"] in ("model_error", "model_contract_error")
    assert last["error"]["request_id"]
    assert "own text" not in str(last)
    for answer in answers:
        assert lines(answer) == pytest.approx(alone(model, 30), abs=1e-5)


def test_a_failed_item_of_a_list_leaves_the_others(server: Server, model: Follower) -> None:
    items = [{"steps": 4}, {"steps": 4, "fail_at": 2}, {"steps": 0}, {"steps": 4}]
    answer = requests.post(f"{server.url}/follower/predict", json={"inputs": items}, timeout=60)
    body = answer.json()
    assert answer.status_code == 500
    assert [error["index"] for error in body["errors"]] == [1, 2]
    for i in (0, 3):
        assert body["outputs"][i] == pytest.approx(alone(model, 4), abs=1e-6)


def test_clients_that_leave_free_their_sequences(server: Server) -> None:
    body = b'{"steps": 1000}'
    head = (
        b"POST /follower/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    for i in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head + body)
            if i % 2:
                connection.recv(100)
    server.emptied("follower")
