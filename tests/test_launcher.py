"""`brimful serve` as its users meet it: real processes, real ports, a plain Ray application of theirs.

One server is shared by the tests that only look at it; each of the others starts its own, at most
two at a time.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from serve_app import processes
from serve_app.ports import is_free, next_free

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

READY_S = 120  # 15 to 20 on an idle machine with two cores

APP = """
import asyncio
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Echo:
    sleeping = 0

    async def __call__(self, request: Request):
        if "s" in request.query_params:
            self.sleeping += 1
            await asyncio.sleep(float(request.query_params["s"]))
            self.sleeping -= 1
        return JSONResponse({"path": request.url.path, "sleeping": self.sleeping})

app = Echo.bind()

def broken(args: dict):
    raise RuntimeError("the builder says no")
"""

CONFIG = """
http_options: {host: 127.0.0.1}
applications:
  - {name: echo, route_prefix: /echo, import_path: "users_own:app"}
"""


class Server(NamedTuple):
    process: "subprocess.Popen[str]"
    port: int
    lines: list[str]

    def get(self, path: str, timeout_s: float = 20) -> tuple[int, str]:
        try:
            url = f"http://127.0.0.1:{self.port}{path}"
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def wait_for(self, text: str, timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.05)

    def wait_until_one_sleeps(self) -> None:
        deadline = time.monotonic() + 30
        while json.loads(self.get("/echo")[1])["sleeping"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Seconds until it has ended."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.monotonic() - began

    @property
    def session(self) -> int:
        return int(json.loads((self.run_dir / "server.json").read_text())["server"])

    @property
    def run_dir(self) -> Path:
        return Path(f"/tmp/brimful-{os.getuid()}/{self.port}")


def start(folder: Path, config: str, port: int) -> Server:
    (folder / "users_own.py").write_text(APP)
    (folder / "config.yaml").write_text(config)
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", "serve", "config.yaml"],
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PORT": str(port),
            "TMPDIR": "/tmp",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(process, port, [])
    assert process.stdout is not None
    threading.Thread(target=server.lines.extend, args=(process.stdout,), daemon=True).start()
    return server


@contextmanager
def running(folder: Path, config: str, port: int) -> Iterator[Server]:
    server = start(folder, config, port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
        if server.process.stdout is not None:
            server.process.stdout.close()


def free_port() -> int:
    return next_free("127.0.0.1", 18_100 + os.getpid() % 500)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("shared"), CONFIG, free_port()) as server:
        server.wait_for("ready in")
        yield server
        # Its end is a test too, without a start of its own: a second signal skips the wait.
        failed: list[bool] = []
        hanging = threading.Thread(target=hang, args=(server, failed))
        hanging.start()
        server.wait_until_one_sleeps()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping: new work")
        assert server.process.poll() is None
        assert server.stop() < 4.5
        hanging.join()
        assert failed == [True]


def hang(server: Server, failed: list[bool]) -> None:
    try:
        server.get("/echo?s=60", timeout_s=70)
    except OSError:
        failed.append(True)


def listeners(session: int) -> list[str]:
    """Addresses that a session's processes listen on, from /proc/net/tcp and tcp6."""
    inodes = set()
    for process in processes.session_members(session):
        try:
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                inodes.add(os.readlink(fd))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1])
    return found


def test_a_users_plain_ray_application_is_served(shared: Server) -> None:
    status, body = shared.get("/echo/x")
    assert status == 200
    assert json.loads(body)["path"] == "/echo/x"
    assert any("curl http://127.0.0.1" in line for line in shared.lines)


def test_unknown_path_gets_our_json(shared: Server) -> None:
    status, body = shared.get("/nowhere")
    assert status == 404
    assert json.loads(body)["error"]["type"] == "not_found"


def test_everything_listens_on_loopback_only(shared: Server) -> None:
    found = listeners(shared.session)
    assert len(found) > 10
    # 127.0.0.1, and the same as an IPv4-mapped IPv6 address
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:")
    assert [address for address in found if not address.startswith(loopback)] == []


def test_dashboard_asks_for_the_token(shared: Server) -> None:
    plan = json.loads((shared.run_dir / "plan.json").read_text())
    url = f"http://127.0.0.1:{plan['dashboard_port']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, timeout=10)
    with caught.value:
        assert caught.value.code == 401


def test_run_folder_and_admin_socket_are_private(shared: Server) -> None:
    assert shared.run_dir.stat().st_mode & 0o777 == 0o700
    (socket,) = shared.run_dir.glob("h/*/a")
    assert socket.stat().st_mode & 0o777 == 0o600


def test_second_server_on_the_same_port_is_refused_with_advice(shared: Server, tmp_path: Path) -> None:
    with running(tmp_path, CONFIG, shared.port) as server:
        assert server.process.wait(30) == 1
        time.sleep(0.1)
        assert "is served by another brimful" in "".join(server.lines)
        assert "PORT=" in "".join(server.lines)


def test_second_server_starts_after_sigkill_drains_and_leaves_nothing(shared: Server, tmp_path: Path) -> None:
    """Beside the first, on ports of its own."""
    port = next_free("127.0.0.1", shared.port)
    with running(tmp_path, CONFIG, port) as killed:
        killed.wait_for("ready in")
        # both at once, so that neither can tidy up after the other
        os.kill(killed.session, signal.SIGKILL)
        killed.process.kill()
        killed.process.wait()
    with running(tmp_path, CONFIG, port) as server:
        server.wait_for("ready in")
        session = server.session
        answers: list[tuple[int, str]] = []
        slow = threading.Thread(target=lambda: answers.append(server.get("/echo?s=3")))
        slow.start()
        server.wait_until_one_sleeps()
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping: new work")
        status, body = server.get("/echo")
        assert status == 503
        assert json.loads(body)["error"]["type"] == "shutting_down"
        began = time.monotonic()
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15  # 3 on an idle machine; the grace alone is 5
        slow.join()
        assert answers[0][0] == 200
        assert processes.session_members(session) == []
        assert is_free("127.0.0.1", port)
        assert [path for path in server.run_dir.rglob("*") if path.is_socket()] == []
    assert shared.get("/echo")[0] == 200


def test_launcher_killed_alone_takes_the_server_with_it(tmp_path: Path) -> None:
    with running(tmp_path, CONFIG, free_port()) as server:
        server.wait_for("Ray started")
        session = server.session
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 60  # Ray notices in its own time
        while processes.session_members(session):
            assert time.monotonic() < deadline, processes.session_members(session)
            time.sleep(0.1)


def test_application_that_fails_is_named_and_ends_the_start(tmp_path: Path) -> None:
    config = CONFIG.replace("users_own:app", "users_own:broken")
    with running(tmp_path, config, free_port()) as server:
        assert server.process.wait(READY_S) == 1
        time.sleep(0.1)
        said = "".join(server.lines)
        assert "application 'echo' failed" in said
        assert "the builder says no" in said


def test_wrong_key_stops_before_anything_starts(tmp_path: Path) -> None:
    began = time.monotonic()
    config = CONFIG.replace("route_prefix", "routeprefix")
    with running(tmp_path, config, free_port()) as server:
        assert server.process.wait(30) == 1
        time.sleep(0.1)
        assert "did you mean 'route_prefix'?" in "".join(server.lines)
        assert time.monotonic() - began < 20  # under 1 on an idle machine: no Ray was started
