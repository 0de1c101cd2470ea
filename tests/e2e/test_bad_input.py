"""Bad input over real HTTP: a clear error with the right status, and the next request is served."""

import gzip
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.e2e.conftest import Server, received

CAT = (Path(__file__).parent.parent / "data" / "cat.jpg").read_bytes()


def post(
    server: Server, app: str, body: bytes | str, *, content_type: str = "application/json", **headers: str
) -> requests.Response:
    data = body.encode() if isinstance(body, str) else body
    headers = {"Content-Type": content_type, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return requests.post(f"{server.url}/{app}/predict", data=data, headers=headers, timeout=60)


@pytest.fixture(autouse=True)
def the_next_request_is_served(server: Server) -> Iterator[None]:
    yield
    for app in ("embed", "classify"):
        stats = requests.get(f"{server.url}/{app}/stats", timeout=30).json()
        assert stats["queue"]["items"] == 0
        assert stats["in_flight"] == 0
    assert post(server, "embed", '{"inputs": ["fine"]}').status_code == 200


def nested(depth: int) -> str:
    return '{"inputs": [' + "[" * depth + "]" * depth + "]}"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("not json", 400, "JSON"),
        ('{"inputs": ["a"', 400, "JSON"),
        ("", 400, ""),
        ("{}", 400, "inputs"),
        ('{"inputs": []}', 400, "empty"),
        ('{"inputs": "a text"}', 400, "inputs"),
        ('{"inputs": ["a"], "input": 1}', 400, "input"),
        ('{"inputs": ["a"], "parameters": {"prio": 1}}', 400, "prio"),
        ('{"inputs": ["a"], "parameters": {"priority": 11}}', 400, "priority"),
        ('{"inputs": ["a"], "parameters": {"timeout_ms": -1}}', 400, "timeout_ms"),
        ('{"inputs": [1]}', 422, "string"),
        ('{"inputs": [null]}', 422, "string"),
        ('{"inputs": [{"a": 1}]}', 422, "string"),
        ('{"inputs": [NaN]}', 400, ""),
        ('{"inputs": [Infinity]}', 400, ""),
        ('{"inputs": [1e999]}', None, ""),
        ('{"inputs": ["\\ud800"]}', None, ""),
        (nested(10_000), 400, ""),
        (b'{"inputs": ["\xff\xfe"]}', 400, ""),
    ],
)
def test_malformed_json_is_named(server: Server, body: str | bytes, status: int | None, says: str) -> None:
    answer = post(server, "embed", body)
    assert answer.status_code == status or (status is None and answer.status_code in (400, 422)), answer.text
    error = answer.json()["error"]
    assert set(error) >= {"type", "message", "param", "request_id"}
    assert says.lower() in (error["message"] + str(error["param"])).lower()
    assert "Traceback" not in answer.text


def test_a_million_items_are_refused_by_their_count(server: Server) -> None:
    answer = post(server, "embed", '{"inputs": [' + "0," * 999_999 + "0]}")
    assert answer.status_code == 413
    assert "max_items_per_request" in answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    answer = post(server, "embed", json.dumps({"inputs": ["x" * (17 << 20)]}))
    assert answer.status_code == 413
    assert "max_body_bytes" in answer.json()["error"]["message"]


def test_ten_megabytes_of_text_are_cut_quickly_and_said_so(server: Server) -> None:
    answer = post(server, "embed", json.dumps({"inputs": ["word " * (2 << 20)]}))
    assert answer.status_code == 200
    assert answer.json()["warnings"][0]["type"] == "truncated"
    assert answer.elapsed.total_seconds() < 5.0


def test_nul_and_odd_characters_are_just_text(server: Server) -> None:
    answer = post(server, "embed", json.dumps({"inputs": ["\u0000", "", "\U0001f600", "a\u202eb"]}))
    assert answer.status_code == 200
    assert len(answer.json()["outputs"]) == 4


def test_one_bad_item_of_a_list_fails_alone(server: Server) -> None:
    answer = post(server, "embed", '{"inputs": ["good", 7, "good"]}')
    body = answer.json()
    assert answer.status_code == 422
    assert [o is None for o in body["outputs"]] == [False, True, False]
    assert [(e["index"], e["type"]) for e in body["errors"]] == [(1, "invalid_item")]


def test_gzip_is_read_and_its_bombs_are_refused(server: Server) -> None:
    good = gzip.compress(b'{"inputs": ["zipped"]}')
    assert post(server, "embed", good, Content_Encoding="gzip").status_code == 200
    bomb = gzip.compress(b" " * (64 << 20))
    assert post(server, "embed", bomb, Content_Encoding="gzip").status_code == 413
    assert post(server, "embed", b"not gzip", Content_Encoding="gzip").status_code == 400
    assert post(server, "embed", good, Content_Encoding="br").status_code == 415


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "image/jpeg", "application/x-www-form-urlencoded"]
)
def test_a_wrong_content_type_is_told_the_right_ones(server: Server, content_type: str) -> None:
    answer = post(server, "embed", '{"inputs": ["a"]}', content_type=content_type)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/embed/predict", 405),
        ("OPTIONS", "/embed/predict", 405),
        ("HEAD", "/embed/predict", 405),
        ("GET", "/embed/predict", 405),
        ("HEAD", "/embed/healthz", 200),
        ("POST", "/embed/stats", 405),
        ("GET", "/embed/nothing", 404),
        ("GET", "/nothing", 404),
    ],
)
def test_methods_and_paths(server: Server, method: str, path: str, status: int) -> None:
    answer = requests.request(method, server.url + path, timeout=30)
    assert answer.status_code == status
    assert len(answer.raw.headers.getlist("X-Request-Id")) == 1
    if status == 405:
        assert answer.headers["Allow"]
    if status >= 400 and method != "HEAD":
        assert answer.json()["error"]["type"]


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def cat() -> Image.Image:
    return Image.open(io.BytesIO(CAT))


def huge_png() -> bytes:
    """A PNG that says 30,000 x 30,000 in its header and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: CAT[: len(CAT) // 2], "truncated"),
        (huge_png, "pixel"),
        (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', ""),
        (lambda: b"\xff\xd8\xff\xe0 garbage", ""),
        (lambda: b"\0" * 1000, ""),
    ],
    ids=["truncated", "30000x30000", "svg called jpeg", "jpeg header only", "zeros"],
)
def test_a_broken_image_is_422_and_says_why(server: Server, data: Callable[[], bytes], says: str) -> None:
    answer = post(server, "classify", data(), content_type="image/jpeg")
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        lambda: encoded(cat().convert("CMYK"), "JPEG"),
        lambda: encoded(cat().convert("P"), "PNG"),
        lambda: encoded(cat().convert("RGBA"), "PNG"),
        lambda: encoded(cat().convert("LA"), "PNG"),
        lambda: encoded(cat().convert("I;16"), "PNG"),
        lambda: encoded(cat().resize((1, 1)), "PNG"),
        lambda: encoded(cat(), "WEBP"),
    ],
    ids=["cmyk", "palette", "alpha", "gray+alpha", "16-bit", "1x1", "webp"],
)
def test_unusual_images_are_read(server: Server, data: Callable[[], bytes]) -> None:
    answer = post(server, "classify", data(), content_type="image/png")
    assert answer.status_code == 200, answer.text


def test_exif_rotation_is_applied(server: Server) -> None:
    upright = cat().convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    turned = encoded(upright.rotate(90, expand=True), "JPEG", exif=exif.tobytes(), quality=95)
    plain = encoded(upright, "JPEG", quality=95)
    a, b = (
        post(server, "classify", data, content_type="image/jpeg").json()["outputs"][0][0]
        for data in (plain, turned)
    )
    assert a["index"] == b["index"]
    assert a["probability"] == pytest.approx(b["probability"], abs=0.05)


def test_bad_base64_and_a_missing_field_are_422(server: Server) -> None:
    for body in ('{"inputs": [{"image_b64": "%%%"}]}', '{"inputs": [{"image": "x"}]}', '{"inputs": ["x"]}'):
        assert post(server, "classify", body).status_code == 422


def oip(server: Server, app: str, body: object, *, binary: bytes | None = None) -> requests.Response:
    head = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if binary is not None:
        headers = {
            "Inference-Header-Content-Length": str(len(head)),
            "Content-Type": "application/octet-stream",
        }
    return requests.post(
        f"{server.url}/{app}/v2/models/{app}/infer", data=head + (binary or b""), headers=headers, timeout=30
    )


def x_of(**changes: object) -> dict[str, object]:
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [1, 5]},
        {"shape": [2, 4]},
        {"shape": [-1, 4]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": []},
        {"datatype": "INT64"},
        {"datatype": "FLOAT"},
        {"name": "z"},
        {"data": ["a", 2, 3, 4]},
        {"data": [1, 2]},
        {"data": None},
    ],
    ids=str,
)
def test_oip_refuses_what_does_not_fit_the_model(server: Server, changes: dict[str, object]) -> None:
    answer = oip(server, "doubler", x_of(**changes))
    assert answer.status_code in (400, 422), answer.text
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_oip_refuses_a_wrong_binary_length(server: Server, size: int) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    assert oip(server, "doubler", {"inputs": [tensor]}, binary=b"\0" * size).status_code in (400, 422)


def upload(server: Server, parts: list[bytes], pause_s: float, head: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"POST /embed/predict HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        for part in parts:
            connection.sendall(part)
        connection.settimeout(pause_s)
        return received(connection)


def test_a_client_that_stops_half_way_gets_408_and_holds_nothing(server: Server) -> None:
    json_head = "Content-Type: application/json\r\n"
    stalls = [
        (json_head + "Content-Length: 100", [b'{"inputs": ['], 12.0),
        (json_head + "Content-Length: 400000", [b'{"inputs": ["' + b"x" * 1000], 12.0),
        (json_head + "Transfer-Encoding: chunked", [b"5\r\n" + b'{"inp' + b"\r\n"], 12.0),
        (json_head + "Content-Length: 100", [b'{"inputs": ['], 0.05),  # closes
    ]
    with ThreadPoolExecutor(len(stalls)) as pool:
        answers = list(pool.map(lambda s: upload(server, s[1], s[2], s[0]), stalls))
    for answer in answers[:3]:
        assert answer.startswith(b"HTTP/1.1 408"), answer[:200]
        assert b'"error"' in answer
    assert answers[3] == b""


def test_a_broken_chunk_is_a_bad_request(server: Server) -> None:
    head = "Content-Type: application/json\r\nTransfer-Encoding: chunked"
    assert upload(server, [b"zz\r\nnonsense\r\n"], 8.0, head).startswith(b"HTTP/1.1 400")


def test_what_is_not_http_is_a_bad_request(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"hello?\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
