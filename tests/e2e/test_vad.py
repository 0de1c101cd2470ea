"""Endless audio over HTTP and WebSockets: results while it comes, equal to the model's own, nothing left."""

import asyncio
import base64
import importlib.util
import io
import json
import random
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import soundfile
import soxr
import torch
import tritonclient.http as triton
import websockets.asyncio.client
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from deployments.models.speech_segments import find_segments
from tests.e2e.conftest import Server

WAV = Path(__file__).parent.parent / "data" / "speech.wav"
FRAME_BYTES = 1024
TURN_BYTES = 10 * FRAME_BYTES  # 320 ms
END = '{"end": true}'


@pytest.fixture(scope="module")
def pcm() -> bytes:
    samples, rate = soundfile.read(WAV, dtype="int16")
    assert rate == 16_000
    return bytes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def expected(pcm: bytes) -> list[float]:
    """The package's own model, stepped alone over each frame."""
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.load(Path(spec.origin).parent / "data" / "silero_vad.jit")
    samples = torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)
    samples = torch.nn.functional.pad(samples, (0, -len(samples) % 512))
    with torch.no_grad():
        return [model(frame, 16_000).item() for frame in samples.split(512)]


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.emptied("vad")


def ws(server: Server, **options: Any) -> ClientConnection:
    url = f"ws://127.0.0.1:{server.port}/vad/ws"
    return connect(url, compression=None, proxy=None, open_timeout=60, close_timeout=10, **options)


def same(results: list[dict[str, float]], expected: list[float]) -> None:
    assert [result["t_s"] for result in results] == pytest.approx(
        [0.032 * (i + 1) for i in range(len(expected))]
    )
    assert [result["speech"] for result in results] == pytest.approx(expected, abs=1e-5)


# Streams


def test_a_websocket_gets_results_while_audio_still_comes(
    server: Server, pcm: bytes, expected: list[float]
) -> None:
    with ws(server) as connection:
        results = []
        for start in range(0, len(pcm) - TURN_BYTES, TURN_BYTES):
            connection.send(pcm[start : start + TURN_BYTES])
            results += [json.loads(connection.recv(timeout=30)) for _ in range(10)]
        connection.send(pcm[start + TURN_BYTES :])
        connection.send(END)
        results += [json.loads(message) for message in connection]
    assert connection.close_code == 1000
    same(results, expected)
    assert max(expected) > 0.9  # there is speech in it


@pytest.mark.parametrize("size", [1, 777, 4096, 100_000], ids=lambda size: f"{size} bytes a message")
def test_how_messages_are_cut_has_no_meaning(
    server: Server, pcm: bytes, expected: list[float], size: int
) -> None:
    pcm = pcm[: 5000 if size == 1 else None]
    with ws(server) as connection:
        for start in range(0, len(pcm), size):
            connection.send(pcm[start : start + size])
        connection.send(END)
        results = [json.loads(message) for message in connection]
    if size == 1:  # of the padded frame the whole signal has more
        results, expected = results[:-1], expected[: len(results) - 1]
    same(results, expected)


def test_a_posted_stream_gives_the_same_line_by_line(
    server: Server, pcm: bytes, expected: list[float]
) -> None:
    url = f"{server.url}/vad/stream"
    whole = requests.post(url, data=pcm, timeout=60)
    assert whole.headers["content-type"] == "application/x-ndjson"
    same([json.loads(line) for line in whole.text.splitlines()], expected)
    pieces = (pcm[i : i + 5000] for i in range(0, len(pcm), 5000))
    with requests.post(url, data=pieces, stream=True, timeout=60) as chunked:
        same([json.loads(line) for line in chunked.iter_lines()], expected)


class RawStream:
    """A chunked POST /vad/stream over a plain socket: writes and reads at the same time."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.socket.sendall(
            b"POST /vad/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        self.file = self.socket.makefile("rb")
        self.is_open = False
        self.rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n" % len(data) + data + b"\r\n")

    def read_head(self) -> bytes:
        self.is_open = True
        return b"".join(iter(self.file.readline, b"\r\n"))

    def lines(self, count: int | None = None) -> list[dict[str, Any]]:
        """The next lines, or all to the end."""
        if not self.is_open:
            assert self.read_head().startswith(b"HTTP/1.1 200")
        lines: list[bytes] = []
        while count is None or len(lines) < count:
            while b"\n" not in self.rest:
                size = int(self.file.readline(), 16)
                self.rest += self.file.read(size)
                self.file.readline()
                if not size:
                    assert count is None
                    assert self.rest == b""
                    return [json.loads(line) for line in lines]
            line, self.rest = self.rest.split(b"\n", 1)
            lines.append(line)
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        self.socket.sendall(b"0\r\n\r\n")

    def __enter__(self) -> "RawStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()


def test_a_chunked_post_is_full_duplex(server: Server, pcm: bytes, expected: list[float]) -> None:
    with RawStream(server) as stream:
        assert stream.read_head().startswith(b"HTTP/1.1 200")  # before anything was sent
        results = []
        for start in range(0, len(pcm) - TURN_BYTES, TURN_BYTES):
            stream.send(pcm[start : start + TURN_BYTES])
            results += stream.lines(10)
        stream.send(pcm[start + TURN_BYTES :])
        stream.end()
        results += stream.lines()
    same(results, expected)


async def test_many_streams_at_once_get_each_its_own_results(
    server: Server, pcm: bytes, expected: list[float]
) -> None:
    """Each begins at another moment of another silence."""

    async def follow(i: int) -> None:
        silence = bytes(FRAME_BYTES * (i % 5))
        url, results = f"ws://127.0.0.1:{server.port}/vad/ws", []
        options: dict[str, Any] = {"compression": None, "proxy": None, "open_timeout": 60}
        async with websockets.asyncio.client.connect(url, **options) as connection:
            for start in range(0, len(pcm), 3 * FRAME_BYTES):
                await connection.send((silence if not start else b"") + pcm[start : start + 3 * FRAME_BYTES])
                if i % 2:
                    await asyncio.sleep(0)
            await connection.send(END)
            results = [json.loads(message) async for message in connection]
        assert len(results) == len(expected) + i % 5
        if not i % 5:
            same(results, expected)
        got[i % 5].append([result["speech"] for result in results])

    got: dict[int, list[list[float]]] = {i: [] for i in range(5)}
    await asyncio.gather(*map(follow, range(30)))
    for alike in got.values():
        assert all(results == pytest.approx(alike[0], abs=1e-5) for results in alike)


def test_more_streams_than_may_be_open_are_told_to_come_back(server: Server) -> None:
    with ExitStack() as held:
        for _ in range(48):
            held.enter_context(ws(server))
        while server.stats("vad")["engine"]["streams"] < 48:
            time.sleep(0.05)
        refused = requests.post(f"{server.url}/vad/stream", data=bytes(2048), timeout=30)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "max_streams" in refused.json()["error"]["message"]
        with ws(server) as one_more:
            assert json.loads(one_more.recv(timeout=30))["error"]["type"] == "overloaded"
            with pytest.raises(ConnectionClosed):
                one_more.recv(timeout=30)
        assert one_more.close_code == 1013


# Whole recordings


def wav_of(samples: "np.ndarray[Any, Any]", rate: int, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def test_a_recording_is_the_same_in_a_raw_body_in_json_in_a_form_and_by_curl(
    server: Server, expected: list[float]
) -> None:
    url, data = f"{server.url}/vad/predict", WAV.read_bytes()
    raw = requests.post(url, data=data, headers={"Content-Type": "audio/wav"}, timeout=60)
    assert raw.status_code == 200, raw.text
    (output,) = raw.json()["outputs"]
    found = find_segments(expected, frame=512, rate=16_000)
    assert output == {"segments": [{"start_s": a / 16_000, "end_s": b / 16_000} for a, b in found]}
    assert found
    item = {"audio_b64": base64.b64encode(data).decode()}
    assert requests.post(url, json={"inputs": [item]}, timeout=60).json()["outputs"] == [output]
    files = [("files", (name, data, "audio/wav")) for name in ("a.wav", "b.wav")]
    assert requests.post(url, files=files, timeout=60).json()["outputs"] == [output] * 2
    curl = ["curl", "-sS", url, "-H", "Content-Type: audio/wav", "--data-binary", f"@{WAV}"]
    assert json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)["outputs"] == [output]


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [(44_100, 2, "PCM_24"), (44_100, 2, "PCM_16"), (48_000, 1, "PCM_32"), (8_000, 1, "PCM_U8")],
)
def test_recordings_of_other_forms_have_about_the_same_segments(
    server: Server, pcm: bytes, rate: int, channels: int, subtype: str
) -> None:
    samples = soxr.resample(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768, 16_000, rate)
    data = wav_of(np.stack([samples] * channels, 1), rate, subtype)
    url, headers = f"{server.url}/vad/predict", {"Content-Type": "audio/wav"}
    outputs = [
        requests.post(url, data=body, headers=headers, timeout=60).json()["outputs"][0]["segments"]
        for body in (data, WAV.read_bytes())
    ]
    assert len(outputs[0]) == len(outputs[1])
    for got, wanted in zip(*outputs, strict=True):
        assert got == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_a_probability_a_frame(
    server: Server, pcm: bytes, expected: list[float], binary: bool
) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}/vad", network_timeout=60) as client:
        metadata = client.get_model_metadata("vad")
        assert metadata["inputs"] == [{"name": "audio", "datatype": "INT16", "shape": [-1]}]
        assert metadata["outputs"] == [{"name": "speech", "datatype": "FP32", "shape": [-1]}]
        samples = np.frombuffer(pcm, "<i2")
        audio = triton.InferInput("audio", list(samples.shape), "INT16")
        audio.set_data_from_numpy(samples, binary_data=binary)
        wanted = triton.InferRequestedOutput("speech", binary_data=binary)
        speech = client.infer("vad", [audio], outputs=[wanted]).as_numpy("speech")
    assert speech.dtype == np.float32
    assert speech.tolist() == pytest.approx(expected, abs=1e-5)


# Clients that leave, and slow ones


def test_clients_that_vanish_at_random_points_leave_nothing(
    server: Server, pcm: bytes, expected: list[float]
) -> None:
    """Forty of them, some before they send anything, some without a closing handshake, one by /stream in
    four; one that stays gets all its results."""
    before = server.stats("vad")["totals"]
    chance = random.Random(0)
    plans = [(i % 4 == 0, chance.randrange(0, 12), chance.randrange(2)) for i in range(40)]

    def vanish(plan: tuple[bool, int, int]) -> None:
        is_post, messages, reads = plan
        if is_post:
            with RawStream(server) as stream:
                for i in range(messages):
                    stream.send(pcm[i * TURN_BYTES :][:TURN_BYTES] or bytes(10))
            return
        with ws(server) as connection:
            for i in range(messages):
                connection.send(pcm[i * TURN_BYTES :][:TURN_BYTES] or bytes(10))
            for _ in range(reads * min(messages, 5)):
                connection.recv(timeout=30)
            connection.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake

    with ThreadPoolExecutor(9) as pool:
        gone = [pool.submit(vanish, plan) for plan in plans]
        stays = pool.submit(requests.post, f"{server.url}/vad/stream", data=pcm, timeout=60)
        for one in gone:
            one.result()
        same([json.loads(line) for line in stays.result().text.splitlines()], expected)
    stats = server.emptied("vad")
    assert stats["totals"]["failed"] == before["failed"]
    left = stats["totals"]["requests"].get("499", 0) - before["requests"].get("499", 0)
    assert left > 20, "who leaves in the middle is counted as such"


def test_a_client_that_leaves_in_the_middle_of_a_recording_frees_it(server: Server) -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(
            f"{server.url}/vad/predict",
            data=wav_of(np.zeros(8_000_000, np.int16), 16_000, "PCM_16"),  # 8 minutes
            headers={"Content-Type": "audio/wav"},
            timeout=(30, 0.05),
        )
    server.emptied("vad")
