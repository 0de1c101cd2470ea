"""One real server for all end-to-end tests: `brimful serve` on a real local Ray cluster, real weights.

It is started from a folder outside the repository, where a user's `my_model.py` lies.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

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
    args: {model: "my_model:Fickle", max_batch_size: 16, max_queue_items: 64, max_items_per_request: 64}
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

    def running(self, app: str, sequences: int = 1) -> None:
        """Until so many sequences have a slot."""
        for _ in range(400):
            if self.stats(app)["engine"]["running"] >= sequences:
                return
            time.sleep(0.02)
        raise AssertionError(f"{app} never ran {sequences} sequences")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 240.0) -> None:
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
    shutil.copy(user_models.__file__, folder / "my_model.py")
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
        yield Server(f"http://127.0.0.1:{port}", port, folder, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
