"""What nobody should send to /vad: broken recordings, broken streams, too much of anything."""

import base64
import gzip
import json
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from serve_app import processes
from tests.e2e.conftest import Server, received
from tests.e2e.test_vad import END, WAV, RawStream, wav_of, ws

TEN_HOURS_BYTES = 10 * 3600 * 16_000 * 2
NOISE = np.random.default_rng(0).integers(-9000, 9000, 16_000).astype(np.int16)


def predict(server: Server, body: bytes, **headers: str) -> requests.Response:
    headers = {"Content-Type": "audio/wav"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return requests.post(f"{server.url}/vad/predict", data=body, headers=headers, timeout=90)


def resident_bytes(server: Server) -> int:
    """Of all processes of the server."""
    pages = 0
    for process in processes.session_members(server.session):
        try:
            pages += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * 4096


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.emptied("vad")


@pytest.fixture(scope="module", autouse=True)
def the_next_request_is_served(server: Server) -> Iterator[None]:
    yield
    assert predict(server, SPEECH).status_code == 200


# Recordings


def header(**changes: int) -> bytes:
    """A WAV header that says what it likes over 2000 bytes of samples."""
    said = {"form": 1, "channels": 1, "rate": 16_000, "frame": 2, "bits": 16, "size": 2000, **changes}
    layout = struct.pack(
        "<HHIIHH", said["form"], said["channels"], said["rate"], 0, said["frame"], said["bits"]
    )
    parts = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", said["size"])
    return b"RIFF" + struct.pack("<I", 2036) + parts + bytes(2000)


SPEECH = WAV.read_bytes()
BROKEN = {
    "its end is missing": (SPEECH[:-1000], "cut off"),
    "a header alone": (SPEECH[:44], "cut off"),
    "half a header": (SPEECH[:30], "cut off"),
    "six bytes": (SPEECH[:6], "expected a WAV file"),
    "claims 4 GB": (header(size=4_000_000_000), "promises 4000000000 bytes"),
    "claims nothing": (header(size=0), "no samples"),
    "rate 0": (header(rate=0), "resample"),
    "rate 4e9": (header(rate=4_000_000_000), "resample it to between 8000 and 48000"),
    "rate 96 kHz": (header(rate=96_000), "resample it to between 8000 and 48000"),
    "no channel": (header(channels=0, frame=0), "channels"),
    "6 channels": (header(channels=6, frame=12), "mix it down"),
    "65,535 channels": (header(channels=65_535), "mix it down"),
    "24 bits in 2 bytes": (header(bits=24), "16-bit PCM"),
    "0 bits": (header(bits=0), "16-bit PCM"),
    "65,535 bits": (header(bits=65_535), "16-bit PCM"),
    "ADPCM": (header(form=2, frame=1, bits=8), ""),
    "no samples": (wav_of(np.zeros(0, np.int16), 16_000, "PCM_16"), "no samples"),
    "NaN": (wav_of(np.full(100, np.nan), 16_000, "FLOAT"), "NaN"),
    "FLAC": (b"fLaC" + bytes(100), "convert it to WAV"),
    "MP3": (b"ID3\x04" + bytes(100), "convert it to WAV"),
    "bare samples": (NOISE.tobytes(), "expected a WAV file"),
    "big-endian": (b"RIFX" + SPEECH[4:], "convert it to WAV"),
}


@pytest.mark.parametrize(("body", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_recording_is_422_and_told_why(server: Server, body: bytes, says: str) -> None:
    item = {"audio_b64": base64.b64encode(body).decode()}
    in_json = requests.post(f"{server.url}/vad/predict", json={"inputs": [item]}, timeout=60)
    for answer in (predict(server, body), in_json):
        assert answer.status_code == 422, answer.text
        error = answer.json()["error"]
        assert says in error["message"]
        assert error["type"] == "invalid_item"


def test_a_recorder_that_could_not_write_its_length_is_read(server: Server) -> None:
    answer = predict(server, header(size=0xFFFF_FFFF))
    assert answer.json() == {"outputs": [{"segments": []}]}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"inputs": ["text"]}, 422, "audio_b64"),
        ({"inputs": [{"audio": "x"}]}, 422, "audio_b64"),
        ({"inputs": [{"audio_b64": "%%%"}]}, 422, "base64"),
        ({"inputs": [{"audio_b64": 5}]}, 422, "base64"),
        ({"inputs": [{"audio_b64": ""}]}, 422, "empty"),
        ({"inputs": [None]}, 422, "audio_b64"),
        ({"inputs": []}, 400, "empty"),
        ({"input": []}, 400, "input"),
    ],
    ids=str,
)
def test_json_that_is_no_recording_is_refused(
    server: Server, body: dict[str, Any], status: int, says: str
) -> None:
    answer = requests.post(f"{server.url}/vad/predict", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_one_broken_recording_of_a_form_fails_alone(server: Server) -> None:
    recordings = {"a.wav": SPEECH, "b.wav": SPEECH[:99], "c.wav": header()}
    files = [("files", (name, data, "audio/wav")) for name, data in recordings.items()]
    answer = requests.post(f"{server.url}/vad/predict", files=files, timeout=60)
    body = answer.json()
    assert answer.status_code == 422
    assert [error["index"] for error in body["errors"]] == [1]
    assert [output is None for output in body["outputs"]] == [False, True, False]


def test_other_content_types_are_told_the_right_ones(server: Server) -> None:
    for content_type in ("audio/mpeg", "text/plain", "application/octet-stream"):
        answer = predict(server, SPEECH, Content_Type=content_type)
        assert answer.status_code == 415
        assert "audio/wav" in answer.json()["error"]["message"]
    assert predict(server, b"").status_code == 400


def test_ten_hours_of_silence_in_one_post_are_refused_before_they_are_held(server: Server) -> None:
    start = header(size=TEN_HOURS_BYTES)[:44]
    zipped = gzip.compress(start + bytes(64 << 20))  # a seventeenth of it: the rest is not looked at
    answers = [predict(server, zipped, Content_Encoding="gzip")]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % TEN_HOURS_BYTES)
        answers.append(answer_on(connection))
    before, most = resident_bytes(server), 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2c\r\n" + start + b"\r\n")
        block = b"800000\r\n" + bytes(8 << 20) + b"\r\n"
        with suppress(OSError):  # it may hang up on a client that does not look
            for _ in range(TEN_HOURS_BYTES // (8 << 20)):
                connection.sendall(block)
                most = max(most, resident_bytes(server))
            answers.append(answer_on(connection))
    for answer in answers:
        assert answer.status_code == 413, answer.text
        assert "max_body_bytes" in answer.json()["error"]["message"]
    assert most - before < 128 << 20


HEAD = b"POST /vad/predict HTTP/1.1\r\nHost: x\r\nContent-Type: audio/wav\r\n"


def answer_on(connection: socket.socket) -> requests.Response:
    head, _, body = received(connection).partition(b"\r\n\r\n")
    answer = requests.Response()
    answer.status_code, answer._content = int(head.split()[1]), body
    return answer


# Tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"datatype": "FP32", "data": [0.5] * 4},
        {"datatype": "INT32"},
        {"shape": [1, 4]},
        {"shape": [5]},
        {"shape": [-1]},
        {"shape": [1 << 50]},
        {"shape": [0], "data": []},
        {"data": [40_000] * 4},
        {"data": ["a"] * 4},
        {"name": "speech"},
    ],
    ids=str,
)
def test_oip_refuses_what_is_no_recording(server: Server, changes: dict[str, Any]) -> None:
    tensor = {"name": "audio", "shape": [4], "datatype": "INT16", "data": [1, 2, 3, 4], **changes}
    url = f"{server.url}/vad/v2/models/vad/infer"
    answer = requests.post(url, json={"inputs": [tensor]}, timeout=60)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]


# Streams


def ended(connection: ClientConnection) -> dict[str, Any]:
    """The last message before the connection closes."""
    last: dict[str, Any] = {}
    try:
        while True:
            last = json.loads(connection.recv(timeout=60))
    except ConnectionClosed:
        return last


@pytest.mark.parametrize("size", [1, 1023, 1025, 9999])
def test_half_a_sample_at_the_end_is_named(server: Server, size: int) -> None:
    answer = requests.post(f"{server.url}/vad/stream", data=bytes(size), timeout=60)
    assert answer.status_code in (200, 422)  # 200 where a result was sent before the end came
    *results, last = [json.loads(line) for line in answer.text.splitlines()]
    assert len(results) == size // 1024
    assert last["error"]["type"] == "invalid_item"
    assert "16-bit samples" in last["error"]["message"]
    with ws(server) as connection:
        connection.send(bytes(size))
        connection.send(END)
        assert "16-bit samples" in ended(connection)["error"]["message"]
    assert connection.close_code == 1008


def test_an_empty_stream_has_no_results(server: Server) -> None:
    answer = requests.post(f"{server.url}/vad/stream", data=b"", timeout=60)
    assert (answer.status_code, answer.text) == (200, "")
    with ws(server) as connection:
        connection.send(b"")
        connection.send(END)
        assert ended(connection) == {}
    assert connection.close_code == 1000


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (["hello"], '{"end": true}'),
        (['{"end": false}'], '{"end": true}'),
        (['{"end": true, "more": 1}'], '{"end": true}'),
        (["[" * 10_000], '{"end": true}'),
        ([bytes(2048), ""], '{"end": true}'),
        ([END, bytes(2)], "behind the end"),
    ],
    ids=["text", "end false", "another field", "nested", "empty text", "data behind the end"],
)
def test_a_websocket_that_sends_what_it_should_not_is_told(
    server: Server, messages: list[str | bytes], says: str
) -> None:
    with ws(server) as connection:
        with suppress(ConnectionClosed):
            for message in messages:
                connection.send(message)
        last = ended(connection)
    if messages[0] == END and not last:  # all was done before more came: that is a good end
        assert connection.close_code == 1000
        return
    assert last["error"]["type"] == "malformed_request"
    assert says in last["error"]["message"]
    assert connection.close_code == 1008


def test_a_message_of_a_hundred_megabytes_is_not_read(server: Server) -> None:
    refused = server.stats("vad")["totals"]["requests"].get("413", 0)
    with ws(server) as connection:
        with suppress(ConnectionClosed):
            connection.send(bytes(100_000_000))
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=60)
        # It is closed while this client still writes: the reset may overtake the code.
        assert connection.close_code in (1009, 1006)
    assert server.emptied("vad")["totals"]["requests"]["413"] == refused + 1


def test_streams_that_send_nothing_are_closed_and_told_so(server: Server) -> None:
    """idle_timeout_s is 5 here."""

    def silent_socket(data: bytes) -> tuple[str, int | None]:
        with ws(server) as connection:
            if data:
                connection.send(data)
            error = ended(connection)["error"]
        return error["type"], connection.close_code

    def silent_post() -> str:
        with RawStream(server) as stream:
            stream.send(bytes(2048))
            *results, last = stream.lines()
        assert len(results) == 2
        return str(last["error"]["type"])

    with ThreadPoolExecutor(3) as pool:
        over_sockets = [pool.submit(silent_socket, data) for data in (bytes(100), b"")]
        over_post = pool.submit(silent_post)
        assert [one.result() for one in over_sockets] == [("stream_timeout", 1013)] * 2
        assert over_post.result() == "stream_timeout"


def test_what_is_no_plain_stream_of_bytes_is_refused(server: Server) -> None:
    url = f"{server.url}/vad/stream"
    zipped = requests.post(
        url, data=gzip.compress(bytes(99)), headers={"Content-Encoding": "gzip"}, timeout=60
    )
    form = requests.post(url, files={"file": bytes(99)}, timeout=60)
    for answer in (zipped, form):
        assert answer.status_code == 415
        assert answer.json()["error"]["message"]
    assert requests.get(url, timeout=60).status_code == 405
    plain = requests.get(f"{server.url}/vad/ws", timeout=60)
    assert plain.status_code == 400
    assert "WebSocket" in plain.json()["error"]["message"]
    for path in ("/vad/v1/chat/completions", "/vad/v1/embeddings"):
        assert requests.post(server.url + path, json={}, timeout=60).status_code == 404


def test_a_client_that_reads_late_gets_all_and_holds_nobody_up(server: Server) -> None:
    with RawStream(server) as late:
        for _ in range(100):
            late.send(bytes(40 * 1024))  # two minutes in all
        other = requests.post(f"{server.url}/vad/stream", data=NOISE.tobytes(), timeout=60)
        assert len(other.text.splitlines()) == 32
        late.end()
        times = [result["t_s"] for result in late.lines()]
    assert times == pytest.approx([0.032 * (i + 1) for i in range(4000)])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_client_that_never_reads_is_held_back_then_cut_off(server: Server) -> None:
    """Sockets on the way hold megabytes of results; then its audio waits, then it is cut off."""
    before, most, sent, block = resident_bytes(server), 0, 0, bytes(1 << 20)
    with RawStream(server) as stream, suppress(OSError):
        while sent < TEN_HOURS_BYTES:
            stream.send(block)
            sent += len(block)
            most = max(most, resident_bytes(server))
    assert sent < TEN_HOURS_BYTES
    assert most - before < 64 << 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_hour_of_silence_through_a_stream_is_followed_in_little_memory(server: Server) -> None:
    """One stream alone runs at 50 to 100 times real time: ten hours would take minutes."""
    before = most = resident_bytes(server)

    def send(stream: RawStream) -> None:
        for _ in range(360):
            stream.send(bytes(320_000))
        stream.end()

    with RawStream(server) as stream, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, stream)
        for _ in range(9):
            last = stream.lines(12_500)[-1]
            most = max(most, resident_bytes(server))
        assert last["t_s"] == pytest.approx(3600)
        assert stream.lines() == []
        sending.result()
    assert most - before < 64 << 20
