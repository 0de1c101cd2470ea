"""One real server for all end-to-end tests: `brimful serve` on a real local Ray cluster, real weights.

It is started from a folder outside the repository, where a user's `my_model.py` lies.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serve_app import processes
from tests import user_models

CONFIG = """
http_options: {host: 127.0.0.1}
logging_config: {enable_access_log: false}
applications:
  - name: embed
    route_prefix: /embed
    import_path: serve_app.builder:dynamic
    args: {model: "deployments.models.minilm:MiniLM"}
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.3}}]
  - name: classify
    route_prefix: /classify
    import_path: serve_app.builder:dynamic
    args: {model: "deployments.models.efficientnet:EfficientNetLite0", max_batch_size: 16}
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.3}}]
  - name: doubler
    route_prefix: /doubler
    import_path: serve_app.builder:dynamic
    args: {model: "my_model:Doubler"}
    deployments: [{name: model, num_replicas: 2, ray_actor_options: {num_cpus: 0.1}}]
  - name: fickle
    route_prefix: /fickle
    import_path: serve_app.builder:dynamic
    args:
      model: "my_model:Fickle"
      safety: shared
      max_batch_size: 16
      max_queue_items: 64
      max_items_per_request: 64
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.1}}]
  - name: chat
    route_prefix: /chat
    import_path: serve_app.builder:continuous
    args: {model: "deployments.models.smollm2:SmolLM2", max_sequences: 8, kv_bytes: 268435456}
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.3}}]
  - name: vad
    route_prefix: /vad
    import_path: serve_app.builder:continuous
    args:
      model: "deployments.models.silero_vad:SileroVad"
      max_sequences: 64
      max_streams: 48
      idle_timeout_s: 5
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.3}}]
  - name: follower
    route_prefix: /follower
    import_path: serve_app.builder:continuous
    args: {model: "my_model:Follower"}
    deployments: [{name: model, ray_actor_options: {num_cpus: 0.1}}]
"""


@dataclass(frozen=True)
class Server:
    url: str
    port: int
    folder: Path
    log: Path

    @property
    def session(self) -> int:
        """The process session that all of the server's processes belong to."""
        run_dir = Path(f"/tmp/brimful-{os.getuid()}/{self.port}")
        return int(json.loads((run_dir / "server.json").read_text())["server"])

    def stats(self, app: str) -> dict[str, Any]:
        return dict(requests.get(f"{self.url}/{app}/stats", timeout=60).json())

    def emptied(self, app: str) -> dict[str, Any]:
        """A continuous application's figures once it serves nobody any more; it holds nothing then."""
        for _ in range(400):
            stats = self.stats(app)
            held = {name: stats["engine"][name] for name in ("running", "waiting", "streams", "blocks_used")}
            if not any(held.values()) and not stats["in_flight"]:
                return stats
            time.sleep(0.05)
        raise AssertionError(f"{app} still holds something: {held}")

    def reaches(self, app: str, figure: str, least: int) -> None:
        """Until a figure of the application's engine is at least so much."""
        for _ in range(1000):
            if self.stats(app)["engine"][figure] >= least:
                return
            time.sleep(0.01)
        raise AssertionError(f"{figure} of {app} never reached {least}")


def received(connection: socket.socket) -> bytes:
    """An answer that says its length, from a plain socket; less where no more comes in time."""
    answer = b""
    with suppress(TimeoutError):
        while True:
            head, _, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
            if length is not None and len(body) >= int(length[1]):
                return answer
            part = connection.recv(65_536)
            if not part:
                return answer
            answer += part
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 400.0) -> None:
    """Until the launcher says that all applications are ready; its output is the error otherwise."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        text = log.read_text()
        if "\nready in " in text:
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("user")
    # Code that was never seen before has no stored verdict: its audit at the first start is a test, too.
    models = Path(user_models.__file__).read_text()
    (folder / "my_model.py").write_text(f"{models}\n\nRUN = {secrets.token_hex(4)!r}\n")
    (folder / "config.yaml").write_text(CONFIG)
    port, log = free_port(), folder / "log.txt"
    brimful = Path(sys.executable).parent / "brimful"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [brimful, "serve", "config.yaml", "--port", str(port)],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "PORT"},
        )
    try:
        wait_ready(process, log)
        server = Server(f"http://127.0.0.1:{port}", port, folder, log)
        yield server
        # Its end is a test too, without a start of its own.
        stop_with_open_streams(server, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def stop_with_open_streams(server: Server, process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM: open streams go on through the grace and are told of the end; no process is left."""
    asked = {"model": "chat", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    url = f"ws://127.0.0.1:{server.port}/vad/ws"
    with (
        requests.post(f"{server.url}/chat/v1/completions", json=asked, stream=True, timeout=60) as chat,
        connect(url, compression=None, proxy=None, open_timeout=60) as audio,
    ):
        events = (line for line in chat.iter_lines() if line)
        assert b'"text"' in next(events)
        assert "speech" in follow(audio)
        session = server.session
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while "error" not in (result := follow(audio)):
            time.sleep(0.2)
        assert result["error"]["type"] == "shutting_down"
        last = list(events)[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - began < 12  # 10 s, and what a busy machine adds
    assert processes.session_members(session) == []


def follow(audio: ClientConnection) -> dict[str, Any]:
    """The result of one more frame, or what came in its place."""
    with suppress(ConnectionClosed):
        audio.send(bytes(1024))
    return dict(json.loads(audio.recv(timeout=30)))
