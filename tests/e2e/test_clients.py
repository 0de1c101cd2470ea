"""The clients people use, each doing the whole job against the real server."""

import base64
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
import tritonclient.http as triton

from tests.e2e.conftest import Server

CAT = Path(__file__).parent.parent / "data" / "cat.jpg"
TEXTS = ["a cat sits on the mat", "a kitten rests on a rug", "the central bank raised its rates"]


def embed(server: Server, texts: list[str]) -> np.ndarray:
    answer = requests.post(f"{server.url}/embed/predict", json={"inputs": texts}, timeout=30)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"])


def test_requests_embeds_texts_that_mean_the_same_close_together(server: Server) -> None:
    cat, kitten, bank = embed(server, TEXTS)
    assert np.linalg.norm(cat) == pytest.approx(1.0, abs=1e-5)
    assert cat @ kitten > 0.5 > cat @ bank


def test_an_answer_tells_its_id_its_timing_and_its_batch(server: Server) -> None:
    answer = requests.post(
        f"{server.url}/embed/predict", json={"inputs": TEXTS}, headers={"X-Request-Id": "mine-1"}, timeout=30
    )
    assert answer.raw.headers.getlist("X-Request-Id") == ["mine-1"]
    assert 'batch;desc="3"' in answer.headers["Server-Timing"]
    made = requests.get(f"{server.url}/embed/healthz", timeout=30)
    assert len(made.raw.headers.getlist("X-Request-Id")) == 1


def test_truncation_is_reported_not_silent(server: Server) -> None:
    answer = requests.post(
        f"{server.url}/embed/predict", json={"inputs": ["short", "word " * 400]}, timeout=30
    )
    (warning,) = answer.json()["warnings"]
    assert warning["index"] == 1
    assert "256" in warning["message"]


def test_curl_classifies_a_photo(server: Server) -> None:
    out = subprocess.run(
        [
            "curl",
            "-s",
            f"{server.url}/classify/predict",
            "-H",
            "Content-Type: image/jpeg",
            "--data-binary",
            f"@{CAT}",
        ],
        capture_output=True,
        check=True,
    ).stdout
    (labels,) = json.loads(out)["outputs"]
    assert len(labels) == 5
    assert any("cat" in label["label"] or "tabby" in label["label"] for label in labels[:3])


def test_an_image_is_the_same_in_a_raw_body_in_json_and_in_a_form(server: Server) -> None:
    url, data = f"{server.url}/classify/predict", CAT.read_bytes()
    raw = requests.post(url, data=data, headers={"Content-Type": "image/jpeg"}, timeout=30).json()
    item = {"image_b64": base64.b64encode(data).decode()}
    in_json = requests.post(url, json={"inputs": [item]}, timeout=30).json()
    files = [("files", ("a.jpg", data, "image/jpeg")), ("files", ("b.jpg", data, "image/jpeg"))]
    form = requests.post(url, files=files, timeout=30).json()
    assert raw["outputs"][0][0]["index"] == in_json["outputs"][0][0]["index"]
    assert [o[0]["index"] for o in form["outputs"]] == [raw["outputs"][0][0]["index"]] * 2


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_embeds(server: Server, binary: bool) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}/embed") as client:
        assert client.is_server_live()
        assert client.is_model_ready("embed")
        text = triton.InferInput("text", [2], "BYTES")
        text.set_data_from_numpy(np.array(TEXTS[:2], dtype=object), binary_data=binary)
        wanted = triton.InferRequestedOutput("embedding", binary_data=binary)
        result = client.infer("embed", [text], outputs=[wanted]).as_numpy("embedding")
    assert result.shape == (2, 384)
    np.testing.assert_allclose(result, embed(server, TEXTS[:2]), atol=1e-6)


def test_tritonclient_classifies(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}/classify") as client:
        image = triton.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([CAT.read_bytes()], dtype=object))
        result = client.infer("classify", [image])
        assert result.as_numpy("index").shape == (1, 5)
        assert result.as_numpy("probability").dtype == np.float32
        assert result.as_numpy("label").shape == (1, 5)


def test_tritonclient_reaches_a_users_own_model(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}/doubler") as client:
        metadata = client.get_model_metadata("doubler")
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        x = triton.InferInput("x", [3, 4], "FP32")
        x.set_data_from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
        y = client.infer("doubler", [x]).as_numpy("y")
    np.testing.assert_array_equal(y, 2 * np.arange(12, dtype=np.float32).reshape(3, 4))


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_embeds(server: Server, encoding: str | None) -> None:
    with openai.OpenAI(base_url=f"{server.url}/embed/v1", api_key="none") as client:
        more = {"encoding_format": encoding} if encoding else {}
        answer = client.embeddings.create(model="embed", input=TEXTS, **more)  # type: ignore[arg-type]
        assert answer.usage.prompt_tokens > 10
        vectors = [d.embedding for d in answer.data]
        if encoding == "base64":
            vectors = [np.frombuffer(base64.b64decode(v), dtype="<f4") for v in vectors]  # type: ignore[arg-type, misc]
    np.testing.assert_allclose(np.array(vectors), embed(server, TEXTS), atol=1e-6)


def test_openai_is_told_which_model_there_is(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/embed/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["embed"]
        with pytest.raises(openai.NotFoundError) as error:
            client.embeddings.create(model="gpt-4", input="x")
    assert error.value.code == "model_not_found"


def test_a_model_in_a_users_own_file_serves_by_one_entry(server: Server) -> None:
    answer = requests.post(f"{server.url}/doubler/predict", json={"inputs": [[1, 2, 3, 4]]}, timeout=30)
    assert answer.json() == {"outputs": [[2, 4, 6, 8]]}


def test_two_replicas_share_the_work(server: Server) -> None:
    def ask(_: int) -> str:
        requests.post(f"{server.url}/doubler/predict", json={"inputs": [[1, 2, 3, 4]]}, timeout=30)
        return str(requests.get(f"{server.url}/doubler/stats", timeout=30).json()["replica"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(40)))) == 2


def test_many_callers_at_once_get_their_own_answers(server: Server) -> None:
    def ask(i: int) -> bool:
        answer = requests.post(f"{server.url}/doubler/predict", json={"inputs": [[i, 0, 0, 1]]}, timeout=30)
        return bool(answer.json()["outputs"] == [[2 * i, 0, 0, 2]])

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(500)))
