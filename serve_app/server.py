"""The process that holds Ray: start, deploy, say what is ready, wait, drain, end everything.

Started by the launcher as the leader of a session of its own (see processes.py); told to stop by
SIGTERM: once to drain, twice to stop at once. If the launcher dies, the kernel sends that SIGTERM.
Imports Ray only inside functions, after the environment is complete.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from serve_app import haproxy_admin, processes, verdicts
from serve_app.plan import READY_FILE, App, Plan

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_QUIET_S = 20.0  # so long without news, and we say what Ray says it waits for


class StartFailed(Exception):
    """An application can't be brought up; the message is for the terminal."""


class Signals:
    """Counts SIGTERM and SIGINT: 0 run, 1 drain, 2 stop at once."""

    def __init__(self) -> None:
        self.count = 0
        self._came = threading.Event()
        self.install()

    def install(self) -> None:
        """Again after ray.init: its C++ side puts a handler of its own, which just dies."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # Explicitly: a process started in the background of a shell script ignores SIGINT.
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        self._came.set()

    def wait(self) -> None:
        self._came.wait()


def say(text: str) -> None:
    """A line for the terminal; nobody there to read it must not keep us from stopping cleanly."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        pass


def main() -> int:
    """Run the plan named on the command line until told to stop. Returns the exit status."""
    began = time.monotonic()
    plan = Plan.read(Path(sys.argv[1]))
    signals = Signals()
    _die_with_parent()
    try:
        client, config = _start(plan, signals, began)
        _await_ready(plan, client, signals, began)
    except StartFailed as failure:
        say(f"\nbrimful: {failure}")
        _end_others()
        return 1
    if not signals.count:
        (Path(plan.run_dir) / READY_FILE).touch()
        say(f"ready in {time.monotonic() - began:.1f} s; Ctrl-C stops it")
        signals.wait()
        _drain(plan, client, config, signals)
    _end_others()
    return 0


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies, even by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _start(plan: Plan, signals: Signals, began: float) -> tuple[Any, Any]:
    import ray
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    from serve_app import loopback

    config = _parsed(ServeDeploySchema, plan.deploy)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    is_local = plan.host in ("127.0.0.1", "localhost")
    if is_local:
        loopback.keep_ray_on_loopback()
    loopback.set_agent_port(plan.agent_port)
    _make_token()
    ray.init(
        address="local",
        namespace="serve",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=plan.dashboard_port,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1" if is_local else None,
        _metrics_export_port=plan.ray_metrics_port,
        _temp_dir=str(Path(plan.run_dir) / "ray"),
        runtime_env={"worker_process_setup_hook": loopback.WORKER_HOOK} if is_local else None,
    )
    signals.install()
    say(f"  Ray started            {time.monotonic() - began:5.1f} s")
    if signals.count:
        raise StartFailed("stopped")
    client = api.serve_start(
        http_options=config.http_options.model_dump(),
        grpc_options=config.grpc_options.model_dump(),
        proxy_location=config.proxy_location,
        controller_options=config.controller_options,
    )
    client.deploy_apps(config, _blocking=False)
    say(f"  Serve started          {time.monotonic() - began:5.1f} s")
    return client, config


def _make_token() -> None:
    """Ray's token, made as Ray makes it at the first start, but readable by its owner only."""
    from ray._private.authentication import authentication_token_setup as setup

    before = os.umask(0o077)
    try:
        setup.ensure_token_if_auth_enabled(create_token_if_missing=True)
    finally:
        os.umask(before)


def _parsed(schema: Any, deploy: dict[str, Any]) -> Any:
    """Ray's own check of the values of its keys."""
    try:
        return schema.model_validate(deploy)
    except ValueError as error:
        raise StartFailed(f"Ray refuses the config file: {error}") from error


def _await_ready(plan: Plan, client: Any, signals: Signals, began: float) -> None:
    """Say each application's name once it answers through the front door."""
    waiting = {app.name: app for app in plan.apps}
    for entry in plan.deploy["applications"]:
        if verdicts.is_audited_first(entry, Path.cwd()):
            say(f"  {entry['name']}: no verdict on its model is stored: it is audited first, up to 1.5 min")
    told = time.monotonic()
    while waiting and not signals.count:
        statuses = {status.name: status for status in client.list_serve_statuses()}
        for app in list(waiting.values()):
            status = statuses.get(app.name)
            if status is None:
                continue
            state = str(status.app_status.status.value)
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartFailed(f"application {app.name!r} failed:\n{_why(status)}")
            if state == "RUNNING" and _answers(plan, app):
                del waiting[app.name]
                told = time.monotonic()
                at = f"{time.monotonic() - began:5.1f} s"
                say(f"  {app.name:<12} ready      {at}  {plan.url}{app.prefix}")
                for line in verdicts.verdict_lines(plan.url + app.prefix) if app.is_ours else ():
                    say(f"      {line}")
                say(f"      {app.try_it}")
        if time.monotonic() - told > _QUIET_S:
            told = time.monotonic()
            for name in waiting:
                why = _why(statuses[name]).strip() if name in statuses else ""
                say(f"  {name}: still waiting" + (f": {why}" if why else ""))
        if time.monotonic() - began > plan.start_timeout_s:
            raise StartFailed(f"not ready within {plan.start_timeout_s:.0f} s: {', '.join(waiting)}")
        time.sleep(_POLL_S)


def _answers(plan: Plan, app: App) -> bool:
    """Whether the application itself, not the proxy for it, answers at its prefix.

    Ours have /healthz. Of a user's plain Ray application we know no harmless request, so its
    prefix is asked for with OPTIONS: any answer but the proxy's 503 and 404 of a missing route.
    """
    path = app.prefix.rstrip("/") + "/healthz" if app.is_ours else app.prefix
    request = urllib.request.Request(plan.url + path, method="GET" if app.is_ours else "OPTIONS")
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status < 500)
    except urllib.error.HTTPError as error:
        error.close()
        return not app.is_ours and error.code not in (404, 502, 503, 504)
    except OSError:
        return False


def _why(status: Any) -> str:
    """Ray's message without the frames of its own machinery: the last lines say what is wrong."""
    messages = [status.app_status.message]
    messages += [d.message for d in status.deployment_statuses if d.message]
    text = max(messages, key=len)
    # Python marks the place in the line above with carets; out of place they say nothing.
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" ^~")]
    return "\n".join(f"    {line}" for line in lines[-12:])


def _drain(plan: Plan, client: Any, config: Any, signals: Signals) -> None:
    """Refuse new work, wait until what was taken is done, at most the grace, or a second signal."""
    began = time.monotonic()
    folder = Path(plan.run_dir) / "h"
    door_closed = plan.uses_haproxy and haproxy_admin.close_door(folder)
    # The replicas are told as well: streams end with an error event, and without HAProxy (or with
    # one that is not ours) they answer 503 themselves. In a thread: a controller that hangs must
    # not hold up the end.
    told = threading.Thread(target=_tell_replicas, args=(client, config, plan), daemon=True)
    told.start()
    say(f"stopping: new work gets 503, work in hand has {plan.grace_s:g} s (Ctrl-C: now)")
    while signals.count < 2 and time.monotonic() - began < plan.grace_s:
        time.sleep(_POLL_S / 2)
        if door_closed or not told.is_alive():
            in_hand = _in_hand(plan, folder)
            if in_hand == 0:
                break
    else:
        say("stopping: time is over, what still runs is cut")


def _in_hand(plan: Plan, folder: Path) -> int | None:
    if not plan.uses_haproxy:
        return _in_hand_of_replicas()
    members = processes.session_members(os.getsid(0))
    # After a reload the old HAProxy lives on as long as it carries a request, and its admin
    # socket is gone: the process itself is the sign.
    old = sum(process.name == "haproxy" for process in members) - 1
    in_hand = haproxy_admin.requests_in_hand(folder)
    return None if in_hand is None else in_hand + max(old, 0)


def _in_hand_of_replicas() -> int | None:
    import ray

    try:
        actors = [
            ray.get_actor(actor["name"], namespace="serve")
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["name"].startswith("SERVE_REPLICA::")
        ]
        counts = ray.get([actor.get_num_ongoing_requests.remote() for actor in actors], timeout=1)
        return int(sum(counts))
    except Exception:  # the outermost edge of stopping: unknown means wait
        return None


def _tell_replicas(client: Any, config: Any, plan: Plan) -> None:
    """Set `draining` in the user_config of our model deployments: applied in place."""
    from ray.serve.schema import ServeDeploySchema

    ours = {app.name for app in plan.apps if app.is_ours}
    changed = config.model_dump(exclude_unset=True)
    for app in changed["applications"]:
        if app["name"] not in ours:
            continue
        deployments = app.setdefault("deployments", [])
        if not any(entry["name"] == "model" for entry in deployments):
            deployments.append({"name": "model"})
        for entry in deployments:
            if entry["name"] == "model":
                # Streams are told at three quarters of the grace, so that their last event gets out.
                told = {"draining": True, "drain_grace_s": max(0.1, 0.75 * plan.grace_s)}
                entry["user_config"] = {**(entry.get("user_config") or {}), **told}
    try:
        client.deploy_apps(ServeDeploySchema.model_validate(changed), _blocking=False)
    except Exception as error:
        say(f"stopping: the replicas could not be told ({error})")


def _end_others() -> None:
    """End every other process of this session; the launcher then sees to what is left of it."""
    mine = os.getpid()
    for number, wait_s in ((signal.SIGTERM, 1.5), (signal.SIGKILL, 1.0)):
        deadline = time.monotonic() + wait_s
        signalled: set[int] = set()
        while time.monotonic() < deadline:
            others = [p for p in processes.session_members(os.getsid(0)) if p.pid != mine]
            if not others:
                return
            for process in others:
                if process.pid not in signalled:
                    signalled.add(process.pid)
                    processes.send(process.pid, number)
            time.sleep(0.05)


if __name__ == "__main__":
    status = main()
    # Not sys.exit: Ray's atexit handlers would wait for processes that have just been ended.
    os._exit(status)
