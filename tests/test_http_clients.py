"""Third-party clients against a real socket: tritonclient, openai, requests, and raw bytes."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import requests
import tritonclient.http as triton
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from tritonclient.utils import InferenceServerException

from serve_app.http import body as body_module
from serve_app.http.app import make_app
from tests.http_fakes import PAIR_CARD, PICTURE_CARD, FakeService, vector_of


def under_prefixes(apps: dict[str, ASGIApp]) -> ASGIApp:
    """Each application under its prefix, the way Serve hands requests over."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        prefix = "/" + scope["path"].split("/")[1]
        await apps[prefix](scope | {"root_path": prefix}, receive, send)

    return app


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    host, port = listener.getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def services() -> dict[str, FakeService]:
    return {
        "/embed": FakeService(),
        "/classify": FakeService(PICTURE_CARD),
        "/pair": FakeService(PAIR_CARD),
    }


@pytest.fixture(scope="module")
def address(services: dict[str, FakeService]) -> Iterator[str]:
    apps = {prefix: make_app(service, adds_request_id=True) for prefix, service in services.items()}
    with serving(under_prefixes(apps)) as address:
        yield address


@contextmanager
def triton_client(address: str, prefix: str) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(url=f"{address}{prefix}")
    try:
        yield client
    finally:
        client.close()


def test_tritonclient_reads_health_and_metadata(address: str) -> None:
    with triton_client(address, "/embed") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("embed")
        assert client.is_model_ready("embed", "1")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "brimful"
        assert client.get_model_metadata("embed")["inputs"][0]["name"] == "text"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_infers_texts(
    address: str, binary_in: bool, binary_out: bool, compression: str | None
) -> None:
    texts = triton.InferInput("text", [2], "BYTES")
    texts.set_data_from_numpy(np.array(["a", "Käse"], dtype=object), binary_data=binary_in)
    wanted = triton.InferRequestedOutput("embedding", binary_data=binary_out)
    with triton_client(address, "/embed") as client:
        result = client.infer(
            "embed",
            [texts],
            outputs=[wanted],
            request_id="7",
            timeout=5_000_000,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
    assert result.get_response()["id"] == "7"
    rows = result.as_numpy("embedding")
    assert rows.dtype == np.float32
    assert rows.tolist() == [vector_of("a"), vector_of("Käse")]


def test_tritonclient_infers_images_and_numbers(address: str) -> None:
    images = triton.InferInput("image", [2], "BYTES")
    images.set_data_from_numpy(np.array([b"\xff\xd8", b"123"], dtype=object))
    with triton_client(address, "/classify") as client:
        result = client.infer("classify", [images])
    assert result.as_numpy("index").tolist() == [[2, 0], [3, 0]]
    assert result.as_numpy("label")[1].tolist() == [b"3 bytes", "Käse".encode()]
    a, b = triton.InferInput("a", [1, 2], "FP32"), triton.InferInput("b", [1], "INT64")
    a.set_data_from_numpy(np.array([[1, 2]], np.float32))
    b.set_data_from_numpy(np.array([3], np.int64), binary_data=False)
    with triton_client(address, "/pair") as client:
        result = client.infer("pair", [a, b])
    assert result.as_numpy("sum").tolist() == [[4, 5]]
    assert result.as_numpy("sign").tolist() == [True]


def test_tritonclient_shows_our_message_on_an_error(address: str) -> None:
    texts = triton.InferInput("txt", [1], "BYTES")
    texts.set_data_from_numpy(np.array(["a"], dtype=object))
    with (
        triton_client(address, "/embed") as client,
        pytest.raises(InferenceServerException, match="no input 'txt'; there is text"),
    ):
        client.infer("embed", [texts])


@pytest.fixture
def openai_client(address: str) -> Iterator[openai.OpenAI]:
    base_url = f"http://{address}/embed/v1"
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_embeds(openai_client: openai.OpenAI) -> None:
    for more in ({}, {"encoding_format": "float"}):
        answer = openai_client.embeddings.create(model="embed", input=["a", "b c"], **more)
        assert [entry.embedding for entry in answer.data] == [vector_of("a"), vector_of("b c")]
        assert answer.usage.total_tokens == 3
    assert [model.id for model in openai_client.models.list()] == ["embed"]


def test_openai_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.embeddings.create(model="gpt", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tokens"):
        openai_client.embeddings.create(model="embed", input=[1, 2])
    with pytest.raises(openai.InternalServerError) as full:
        openai_client.embeddings.create(model="embed", input="full")
    assert full.value.response.headers["retry-after"] == "3"


def test_requests_sends_json_raw_images_and_forms(address: str) -> None:
    with requests.Session() as session:
        url = f"http://{address}/classify/predict"
        raw = session.post(url, data=b"abc", headers={"content-type": "image/png"})
        form = session.post(url, files=[("f", ("a.png", b"abc")), ("f", ("b.png", b"a"))])
        text = session.post(f"http://{address}/embed/predict", json={"inputs": ["a"]})
    assert raw.json()["outputs"] == [[{"label": "3 bytes", "index": 3}]]
    assert len(form.json()["outputs"]) == 2
    assert text.json()["outputs"] == [vector_of("a")]
    assert len(text.headers["x-request-id"]) == 32


def exchange(address: str, *pieces: bytes) -> bytes:
    """Send raw bytes, then read until the server has answered or closed."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return connection.recv(65536)


POST = b"POST /embed/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_body_that_stops_half_way_is_408(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "STALL_TIMEOUT_S", 0.1)
    answer = exchange(address, POST + b"content-length: 100\r\n\r\n", b'{"inputs"')
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_hangs_up_half_way_is_counted_and_harms_nobody(
    address: str, services: dict[str, FakeService]
) -> None:
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(POST + b"content-length: 100\r\n\r\n{")
    deadline = time.monotonic() + 5
    while (499, "/predict") not in services["/embed"].counted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (499, "/predict") in services["/embed"].counted
    assert requests.get(f"http://{address}/embed/healthz", timeout=5).ok


def test_a_chunked_body_is_read(address: str) -> None:
    body = b'{"inputs":["a"]}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = exchange(address, POST + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.split(b"\r\n\r\n")[1]) == {"outputs": [vector_of("a")]}


def test_an_upload_over_the_limit_gets_its_413_and_the_connection_goes_on(address: str) -> None:
    with requests.Session() as session:
        url = f"http://{address}/embed/predict"
        headers = {"content-type": "application/json"}
        assert session.post(url, data=b" " * (3 << 20), headers=headers).status_code == 413
        assert session.post(url, json={"inputs": ["a"]}).status_code == 200
