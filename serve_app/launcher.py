"""`brimful serve FILE`: check, prepare, start the server process, pass signals on, leave nothing.

This process never imports Ray. It holds the locks (run folder, port block), starts serve_app.server
in a session of its own, and when that ends, however it ends, ends what is left of the session.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from serve_app import environment, processes
from serve_app.config_file import CheckedConfig, ConfigError, check_file
from serve_app.plan import READY_FILE, App, Plan
from serve_app.ports import PortBlock, PortError, is_free, next_free, take_block
from serve_app.rundir import PortServedError, RunDir, RunDirError

# From the first signal: the grace, then 3.5 s to end Ray (1.5 polite, 1 by force, and a margin).
_END_S = 3.5
_POLL_S = 0.05


class LaunchError(Exception):
    """Nothing was started; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the Ray Serve config file")
    parser.add_argument("--port", type=int, help="HTTP port (else $PORT, else the file's, else 8000)")
    parser.add_argument("--host", help="listen here (else the file's, else 127.0.0.1)")
    parser.add_argument("--grace-s", type=float, default=5.0, help="what work in hand gets when stopping (5)")
    parser.add_argument(
        "--start-timeout-s", type=float, default=600.0, help="give up on loading after this (600)"
    )


def serve(options: argparse.Namespace) -> int:
    """Run the server in the foreground; returns the exit status."""
    try:
        return _serve(options)
    except (ConfigError, environment.EnvFileError, LaunchError, PortError, RunDirError) as error:
        print(f"brimful: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace) -> int:
    env_file = environment.load(options.file)  # before anything can import Ray
    checked = check_file(options.file)
    host = options.host or checked.host or "127.0.0.1"
    port = _port(options, checked)
    try:
        run_dir = RunDir(port)
    except PortServedError as error:
        raise LaunchError(f"{error}. {_another_port(host, port)}") from None
    ended = run_dir.end_leftovers()
    if ended:
        print(f"brimful: ended what an earlier server left: {', '.join(ended)}")
    _require_free(host, port)
    block = take_block()
    print(f"brimful: {options.file} on http://{_reachable(host)}:{port}, logs in {run_dir.logs}")
    if not environment.uses_haproxy():
        print(
            f"brimful: no {environment.NAME if env_file is None else 'HAProxy'}: all works, but "
            "through Ray's Python proxy, 7 to 20 times slower"
        )
    plan = _plan(options, checked, host, port, run_dir, block)
    try:
        return _run(plan, run_dir, block)
    finally:
        run_dir.close()
        block.close()


def _port(options: argparse.Namespace, checked: CheckedConfig) -> int:
    text = os.environ.get("PORT", "").strip()
    if options.port is None and text and not (text.isascii() and text.isdigit()):
        raise LaunchError(f"PORT={text!r} is not a number")
    port = int(options.port or text or checked.port or 8000)
    if not 0 < port < 65_536:
        raise LaunchError(f"port {port} is not between 1 and 65535")
    return port


def _require_free(host: str, port: int) -> None:
    if is_free(host, port):
        return
    raise LaunchError(f"port {port} is taken by another program. {_another_port(host, port)}")


def _another_port(host: str, port: int) -> str:
    other = next_free(host, port)
    return f"Use another: `PORT={other} make serve` or `brimful serve FILE --port {other}`"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _plan(
    options: argparse.Namespace,
    checked: CheckedConfig,
    host: str,
    port: int,
    run_dir: RunDir,
    block: PortBlock,
) -> Plan:
    http = {**checked.deploy.get("http_options", {}), "host": host, "port": port}
    url = f"http://{_reachable(host)}:{port}"
    return Plan(
        deploy={**checked.deploy, "http_options": http},
        apps=tuple(
            App(app.name, app.prefix, app.is_ours, _try_it(app.model, url + app.prefix.rstrip("/")))
            for app in checked.apps
        ),
        host=_reachable(host),
        port=port,
        run_dir=str(run_dir.path),
        dashboard_port=block.dashboard,
        ray_metrics_port=block.ray_metrics,
        agent_port=block.agent,
        grace_s=options.grace_s,
        uses_haproxy=environment.uses_haproxy(),
        start_timeout_s=options.start_timeout_s,
    )


_JSON = "-H 'Content-Type: application/json' -d"
_TRY = {
    ":MiniLM": f"""/predict {_JSON} '{{"inputs": ["to the brim"]}}'""",
    ":EfficientNetLite0": "/predict -H 'Content-Type: image/jpeg' --data-binary @tests/data/cat.jpg",
    ":SmolLM2": f"""/predict {_JSON} '{{"inputs": ["What is the capital of France?"]}}'""",
    ":SileroVad": "/predict -H 'Content-Type: audio/wav' --data-binary @tests/data/speech.wav",
}


def _try_it(model: str | None, url: str) -> str:
    if model is None:
        return f"curl {url}/"
    for ending, arguments in _TRY.items():
        if model.endswith(ending):
            return f"curl {url}{arguments}"
    return f"curl {url}/docs"


def _run(plan: Plan, run_dir: RunDir, block: PortBlock) -> int:
    """Start the server process, wait for its end, and make sure that it is one."""
    plan_file = run_dir.path / "plan.json"
    plan.write(plan_file)
    signals: list[float] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signals.append(time.monotonic()))
    mark = secrets.token_hex(16)
    # Both go away with this process; the session number outlives it.
    child = subprocess.Popen(
        [sys.executable, "-m", "serve_app.server", str(plan_file)],
        env=_child_environment(run_dir, block, mark),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    record = run_dir.write_record(child.pid, mark)
    passed_on = 0
    while not _has_ended(child.pid):
        time.sleep(_POLL_S)
        if len(signals) > passed_on:
            passed_on += 1
            if not (run_dir.path / READY_FILE).exists():
                break  # nothing in hand yet: no need to drain
            processes.send(child.pid, signal.SIGTERM)
        if signals and time.monotonic() - signals[0] > plan.grace_s + _END_S:
            break
    left = processes.end_session(record.server, record.server_ticks, mark, term_s=0)
    status = child.wait()
    if left:
        print(f"brimful: these processes don't end: {', '.join(left)}", file=sys.stderr)
        return 1
    if signals:
        print("stopped: no process, port or socket is left")
        return 0
    if status:
        return 1
    print("brimful: the server process ended by itself", file=sys.stderr)
    return 1


def _has_ended(pid: int) -> bool:
    """Without taking its exit status: as a zombie it keeps its pid, and so the session number, ours."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # started with SIGCHLD ignored: the kernel has taken the status already
        return True


def _child_environment(run_dir: RunDir, block: PortBlock, mark: str) -> dict[str, str]:
    """The server's environment: ours, free ports, and HAProxy's files in the run folder."""
    environ = dict(os.environ)
    block.export(environ)
    folder = run_dir.haproxy
    folder.mkdir(mode=0o700)
    environ.update(
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(folder / "haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=str(folder / "a"),
        RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=str(folder / "m"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(folder),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(folder / "server-state"),
        BRIMFUL_PYTHON=sys.executable,
        **{processes.MARK: mark},
        # Ray's dashboard and agents would write their titles over their environment, the mark included.
        SPT_NOENV="1",
        PYTHONUNBUFFERED="1",
    )
    # The user's own model lies where the server is started; Ray's workers get the driver's folder.
    paths = [os.getcwd(), *filter(None, [environ.get("PYTHONPATH")])]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    return environ
