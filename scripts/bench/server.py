"""A server of our own for one benchmark: `brimful serve` on a generated config file.

Owns: start, stop, /stats, and the CPU and memory of all its processes together. Must not know: what
is measured.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml

from scripts.bench.processes import Tree, free_port
from serve_app.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


def application(name: str, model: str, **args: Any) -> dict[str, Any]:
    """One entry of ours for config.yaml; `args` are the application's own.

    Half a CPU to Ray's scheduler, so that a few fit on two cores; torch's threads don't follow it. Its safety
    is named, so that nothing is audited before a measurement begins.
    """
    return _entry("dynamic", name, {"model": model, "safety": "shared", **args})


def continuous(name: str, model: str, **args: Any) -> dict[str, Any]:
    """The same for a model whose sequences join and leave at every step."""
    return _entry("continuous", name, {"model": model, **args})


def _entry(builder: str, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": f"serve_app.builder:{builder}",
        "args": args,
        "deployments": [{"name": "model", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}}],
    }


def shipped(name: str) -> dict[str, Any]:
    """The entry of the repository's own config.yaml: what is measured is what users start."""
    entries = yaml.safe_load((ROOT / "config.yaml").read_text())["applications"]
    return next(dict(entry) for entry in entries if entry["name"] == name)


def plain_application(name: str, import_path: str) -> dict[str, Any]:
    """A Ray Serve application that is none of ours, for comparisons under the same front door."""
    return {"name": name, "route_prefix": f"/{name}", "import_path": import_path}


AnyServer = TypeVar("AnyServer", bound="Spawned")  # typing.Self is not there in Python 3.10


class Spawned:
    """A server process of any kind: started with a command, ready when `is_ready` says so."""

    def __init__(self, command: Sequence[str], *, port: int, env: Mapping[str, str] | None = None) -> None:
        self.port = port
        handle, path = tempfile.mkstemp(prefix="bench-", suffix=".log")
        self._log = Path(path)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(handle)
        self.tree = Tree(self._process.pid)

    def __enter__(self: AnyServer) -> AnyServer:
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def is_ready(self) -> bool:
        raise NotImplementedError

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log()[-4000:]}")
            time.sleep(0.2)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """SIGINT, and whatever is left after a while is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
        self.tree.kill()
        self._process.wait()
        self._log.unlink()

    def get(self, path: str) -> tuple[int, bytes]:
        """One GET; (0, b"") where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
        """One POST, to see that the way is open; (0, b"") where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


class Server(Spawned):
    """`brimful serve` with these applications on a free port; use as a context manager."""

    def __init__(self, *applications: Mapping[str, Any]) -> None:
        self.config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1"},
            "logging_config": {"enable_access_log": False},
            "applications": list(applications),
        }
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        port = free_port()
        command = [sys.executable, "-m", "serve_app.cli", "serve", str(path), "--port", str(port)]
        super().__init__(command, port=port)

    def is_ready(self) -> bool:
        return "\nready in " in self.log()

    def stop(self) -> None:
        super().stop()
        self._folder.cleanup()

    def scale(self, app: str, replicas: int) -> None:
        """Deploy another num_replicas; returns when the replicas' processes are there, or gone."""
        plan = self._plan()
        for entry in plan.deploy["applications"]:
            if entry["name"] == app:
                entry["deployments"][0]["num_replicas"] = replicas
        path = Path(self._folder.name) / "scaled.json"
        plan.write(path)
        command = [sys.executable, "-m", "scripts.bench.redeploy", str(path), self._gcs_address()]
        subprocess.run(command, cwd=ROOT, check=True, timeout=START_TIMEOUT_S)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._running_replicas(app) != replicas:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{app} did not get {replicas} replicas:\n{self.log()[-4000:]}")
            time.sleep(0.5)

    def _plan(self) -> Plan:
        """What the launcher gave to the server process: the file that is its last argument."""
        for pid in self.tree.members():
            words = _command_line(pid).split(b"\0")
            if b"serve_app.server" in words:
                return Plan.read(Path(words[words.index(b"serve_app.server") + 1].decode()))
        raise RuntimeError("the server process is gone")

    def _gcs_address(self) -> str:
        """As the raylet was told."""
        option = b"--gcs-address="
        words = (word for pid in self.tree.members() for word in _command_line(pid).split(b"\0"))
        return next(word.removeprefix(option).decode() for word in words if word.startswith(option))

    def _running_replicas(self, app: str) -> int:
        """By their processes: Ray names each after its application and deployment."""
        title = f"ServeReplica:{app}:".encode()
        return sum(title in _command_line(pid) for pid in self.tree.members())

    def stats(self, app: str) -> dict[str, Any]:
        """/stats of the application's replica; schema in docs/reference/stats.md."""
        status, body = self.get(f"/{app}/stats")
        if status != 200:
            raise RuntimeError(f"/{app}/stats answered {status}: {body[:200]!r}")
        value: dict[str, Any] = json.loads(body)
        return value


def _command_line(pid: int) -> bytes:
    """Words separated by NUL; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
