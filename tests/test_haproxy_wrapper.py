"""The wrapper that edits Ray's HAProxy config, on configs rendered by Ray's own template.

Live where it matters: a real HAProxy, started through the wrapper, before a small HTTP server.
"""

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app import haproxy_admin, haproxy_config
from serve_app.environment import HAPROXY_WRAPPER
from serve_app.ports import next_free

BUFSIZE = 65_536


def render(folder: Path, port: int, backend_port: int) -> Path:
    """Ray's config for one application at /a, as its HAProxyManager writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at import
        from ray.serve._private.haproxy import (
            BackendConfig,
            HAProxyApi,
            HAProxyConfig,
            ServerConfig,
        )
        from ray.serve.config import HTTPOptions

    (folder / "n").mkdir()
    path = folder / "n" / "haproxy.cfg"
    config = HAProxyConfig(
        socket_path=str(folder / "n" / "a"),
        server_state_base=str(folder / "n"),
        server_state_file=str(folder / "n" / "server-state"),
        metrics_socket_path=str(folder / "n" / "m"),
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        metrics_port=next_free("127.0.0.1", port + 1),
        stats_port=next_free("127.0.0.1", port + 10),
        bufsize=BUFSIZE,
        nbthread=1,
        retry_on="conn-failure empty-response junk-response",
        has_received_routes=True,
        is_head=True,
    )
    replica = ServerConfig(name="r", host="127.0.0.1", port=backend_port)
    gone = ServerConfig(name="gone", host="127.0.0.1", port=1)
    api = HAProxyApi(
        config,
        {
            "http-a": BackendConfig(name="http-a", path_prefix="/a", app_name="a", servers=[replica]),
            "http-gone": BackendConfig(
                name="http-gone", path_prefix="/gone", app_name="gone", servers=[gone]
            ),
        },
        config_file_path=str(path),
    )
    api._generate_config_file_internal()
    return path


class Replica(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    deaths = 0

    def do_GET(self) -> None:
        if self.path == "/a/id":
            self._answer(200, self.headers["x-request-id"], {"X-Request-Id": "from-replica"})
        elif self.path == "/a/503":
            self._answer(503, "mine")
        else:
            self._answer(200, str(self.headers["x-request-id"]))

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        if self.path == "/a/die-once" and Replica.deaths == 0:
            Replica.deaths += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(200, str(len(body)))

    def _answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """(port, folder) of a HAProxy started through the wrapper."""
    folder = tmp_path_factory.mktemp("h")
    backend = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    backend.daemon_threads = True
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    port = next_free("127.0.0.1", 18_000)
    path = render(folder, port, backend.server_address[1])
    process = start(path, folder)
    yield port, folder
    process.terminate()
    process.wait()
    backend.shutdown()
    backend.server_close()


def start(path: Path, folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / "stderr").open("wb") as log:
        process = subprocess.Popen(
            [str(HAPROXY_WRAPPER), "-db", "-f", str(path), "-dR"],
            env={**os.environ, "BRIMFUL_PYTHON": sys.executable},
            stderr=log,
        )
    for _ in range(100):
        if haproxy_admin.sockets(folder) and haproxy_admin.requests_in_hand(folder) is not None:
            return process
        assert process.poll() is None, (folder / "stderr").read_text()
        time.sleep(0.05)
    raise AssertionError("HAProxy does not answer: " + (folder / "stderr").read_text())


def ask(
    port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(
            method, path, body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, [(k.lower(), v) for k, v in answer.getheaders()], answer.read()
    finally:
        connection.close()


def test_every_edit_finds_its_line_in_this_version_of_ray(tmp_path: Path) -> None:
    text = render(tmp_path, 18_500, 1).read_text()
    edited, missing = haproxy_config.edit(text)
    assert missing == []
    binds = [line.split()[1] for line in edited.splitlines() if line.split()[:1] == ["bind"]]
    assert len(binds) == 3
    assert all(bind.startswith("127.0.0.1:") for bind in binds)
    assert "mode 600 level admin" in edited
    assert "mode 666" not in edited
    assert "errorfile 50" not in edited


def test_an_unknown_template_is_served_with_what_could_be_applied() -> None:
    edited, missing = haproxy_config.edit("global\n    maxconn 10\ndefaults\n    mode http\n")
    assert "http-error status 503" in edited
    assert missing == ["404", "admin socket", "front door", "frontend prometheus", "listen stats"]


def test_a_config_that_haproxy_refuses_is_left_as_ray_wrote_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text("nonsense here\n")
    haproxy_config._apply(haproxy_config.find_haproxy(), str(path))
    assert path.read_text() == "nonsense here\n"
    assert "refuses our config" in capsys.readouterr().err


def test_wrapper_becomes_haproxy_with_the_same_pid_and_arguments(
    proxy: tuple[int, Path],
) -> None:
    info = haproxy_admin.command(haproxy_admin.sockets(proxy[1])[0], "show info")
    pid = next(line.split()[1] for line in info.splitlines() if line.startswith("Pid:"))
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert command[0].endswith(b"/haproxy")
    assert str(proxy[1] / "n" / "haproxy.cfg").encode() in command
    assert (proxy[1] / "n" / "a").stat().st_mode & 0o777 == 0o600


def test_own_answers_are_our_json_with_the_right_status_and_one_request_id(
    proxy: tuple[int, Path],
) -> None:
    for path, status, kind in (("/nowhere", 404, "not_found"), ("/gone/x", 503, "unavailable")):
        got, headers, body = ask(proxy[0], path, X_Request_Id="mine-1")
        assert got == status
        error = json.loads(body)["error"]
        assert error["type"] == kind
        assert set(error) == {"type", "message", "param", "request_id"}
        assert error["request_id"] == "mine-1"
        assert [v for k, v in headers if k == "x-request-id"] == ["mine-1"]
        assert dict(headers)["content-type"] == "application/json"
        assert (status == 503) == ("retry-after" in dict(headers))


@pytest.mark.parametrize(
    "given", ['a"b\\c%[uuid]', "x" * 129, "x" * 300, "a\tb", "", "a b", "a,b", "a, a", "caf\xe9"]
)
def test_an_unfit_request_id_is_replaced_before_anything(proxy: tuple[int, Path], given: str) -> None:
    """One id: for the replica (whose middleware echoes it), in our bodies and in the answer's head."""
    _, headers, body = ask(proxy[0], "/nowhere", X_Request_Id=given)
    made = json.loads(body)["error"]["request_id"]
    assert len(made) == 36
    assert [v for k, v in headers if k == "x-request-id"] == [made]
    _, headers, body = ask(proxy[0], "/a/x", X_Request_Id=given)
    assert len(body) == 36
    assert [v for k, v in headers if k == "x-request-id"] == [body.decode()]


@pytest.mark.parametrize("given", ["x" * 128, "a", "Root=1-67891233-abcdef:x/y+z_9.=="])
def test_a_fit_request_id_stays(proxy: tuple[int, Path], given: str) -> None:
    _, headers, body = ask(proxy[0], "/a/x", X_Request_Id=given)
    assert body.decode() == given
    assert [v for k, v in headers if k == "x-request-id"] == [given]


def test_two_request_ids_become_a_new_one(proxy: tuple[int, Path]) -> None:
    with socket.create_connection(("127.0.0.1", proxy[0]), timeout=5) as channel:
        head = b"GET /a/x HTTP/1.1\r\nhost: x\r\nx-request-id: a\r\nx-request-id: b c\r\n\r\n"
        channel.sendall(head)
        answer = b""
        while b"\r\n\r\n" not in answer or answer.endswith(b"\r\n\r\n"):
            answer += channel.recv(65_536)
    assert len(answer.partition(b"\r\n\r\n")[2]) == 36


def test_replica_sees_the_request_id_and_its_own_answer_is_not_doubled(
    proxy: tuple[int, Path],
) -> None:
    _, headers, body = ask(proxy[0], "/a/id")
    assert len(body) == 36
    assert [v for k, v in headers if k == "x-request-id"] == ["from-replica"]
    _, headers, body = ask(proxy[0], "/a/x")
    assert [v for k, v in headers if k == "x-request-id"] == [body.decode()]


def test_a_replicas_own_503_passes_unchanged(proxy: tuple[int, Path]) -> None:
    status, _, body = ask(proxy[0], "/a/503")
    assert (status, body) == (503, b"mine")


def test_what_is_no_http_gets_a_400(proxy: tuple[int, Path]) -> None:
    """HAProxy's parser answers it before any rule or errorfile: HTML, and the docs say so."""
    with socket.create_connection(("127.0.0.1", proxy[0]), timeout=5) as channel:
        channel.sendall(b"GET /a HTTP/1.1\r\nbad header\r\n\r\n")
        assert channel.recv(65_536).startswith(b"HTTP/1.1 400")


def test_stalled_body_gets_408_after_five_seconds(proxy: tuple[int, Path]) -> None:
    with socket.create_connection(("127.0.0.1", proxy[0]), timeout=10) as channel:
        channel.sendall(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
        began = time.monotonic()
        answer = channel.recv(65_536)
        assert 4 < time.monotonic() - began < 7
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["type"] == "body_stalled"


def test_a_request_is_sent_again_when_its_replica_dies(proxy: tuple[int, Path]) -> None:
    Replica.deaths = 0
    status, _, body = ask(proxy[0], "/a/die-once", "POST", b"x" * 20_000)
    assert (Replica.deaths, status, body) == (1, 200, b"20000")


def test_a_body_larger_than_the_buffer_streams_through(proxy: tuple[int, Path]) -> None:
    status, _, body = ask(proxy[0], "/a/x", "POST", b"x" * 1_000_000)
    assert (status, body) == (200, b"1000000")


def test_closed_door_refuses_new_work_but_answers_health_checks(tmp_path: Path) -> None:
    port = next_free("127.0.0.1", 18_700)
    process = start(render(tmp_path, port, 1), tmp_path)
    try:
        assert haproxy_admin.requests_in_hand(tmp_path) == 0
        assert haproxy_admin.close_door(tmp_path)
        status, headers, body = ask(port, "/a")
        assert (status, dict(headers)["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["type"] == "shutting_down"
        assert json.loads(ask(port, "/-/routes")[2]) == {"/a": "a", "/gone": "gone"}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_wrapper_starts_quickly(tmp_path: Path) -> None:
    path = render(tmp_path, 18_800, 1)
    times = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(
            [str(HAPROXY_WRAPPER), "-v", "-f", str(path)],
            env={**os.environ, "BRIMFUL_PYTHON": sys.executable},
            check=True,
            capture_output=True,
        )
        times.append(time.monotonic() - began)
    # 50 ms on an idle machine; ten times that under a full test run
    assert min(times) < 0.5, times
