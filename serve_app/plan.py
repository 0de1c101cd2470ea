"""What the launcher hands to the server process: the checked config and how to run it, as one file.

Owns: the plan's fields and its JSON. The launcher has checked and decided everything in it, so that
the process that imports Ray (2 s) has nothing left to refuse.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

READY_FILE = "ready"  # in the run folder, once every application answers


@dataclass(frozen=True, slots=True)
class App:
    """One application as the launcher's messages need it. `is_ours`: built by serve_app.builder."""

    name: str
    prefix: str  # "/embed", or "/" for the root
    is_ours: bool
    try_it: str  # arguments for curl after the URL's host, see launcher


@dataclass(frozen=True, slots=True)
class Plan:
    deploy: dict[str, Any]  # what Ray's ServeDeploySchema takes
    apps: tuple[App, ...]
    host: str  # where to reach the server from this machine
    port: int
    run_dir: str
    dashboard_port: int
    ray_metrics_port: int
    agent_port: int
    grace_s: float
    uses_haproxy: bool
    start_timeout_s: float

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "Plan":
        fields = json.loads(path.read_text())
        fields["apps"] = tuple(App(**app) for app in fields["apps"])
        return Plan(**fields)
