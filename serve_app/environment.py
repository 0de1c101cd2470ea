"""Loads `serve.env`: the settings that Ray reads at import, before any config file.

Owns: where the file is looked for and its syntax (KEY=VALUE, `#` comments, optional quotes: what a
shell's `set -a; . serve.env` and python-dotenv both read). Must not import Ray: these variables are
useless once it is imported.
"""

import os
import re
import shlex
import sys
from collections.abc import MutableMapping
from pathlib import Path

NAME = "serve.env"
HAPROXY_WRAPPER = Path(__file__).parent / "haproxy-brimful"
_LINE = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*?)\s*$")


class EnvFileError(Exception):
    """A line of serve.env that is no KEY=VALUE; the message names file and line."""


def find(config_file: Path) -> Path | None:
    """`serve.env` beside the config file, else the package's own; None where neither exists."""
    for folder in (config_file.resolve().parent, Path(__file__).parent.parent):
        candidate = folder / NAME
        if candidate.is_file():
            return candidate
    return None


def parse(text: str, source: str = NAME) -> dict[str, str]:
    """The assignments in `text`, in order. Nothing is expanded: `$` stands for itself."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise EnvFileError(f"{source}, line {number}: expected KEY=VALUE, got {line.strip()!r}")
        key, value = match.groups()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        else:
            value = value.split(" #", 1)[0].rstrip()
        values[key] = value
    return values


def load(config_file: Path, environ: MutableMapping[str, str] = os.environ) -> Path | None:
    """Set what serve.env says and `environ` does not yet; returns the file read, or None.

    With HAProxy on, its binary is our wrapper unless the environment names another.
    """
    path = find(config_file)
    if path is not None:
        for key, value in parse(path.read_text(), str(path)).items():
            environ.setdefault(key, value)
    # A local ray.init would otherwise turn token mode on by itself, and a later command of a shell
    # without it then fails: say it explicitly, always.
    environ.setdefault("RAY_AUTH_MODE", "token")
    if uses_haproxy(environ) and os.access(HAPROXY_WRAPPER, os.X_OK):
        environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(HAPROXY_WRAPPER))
    return path


def uses_haproxy(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether Ray will put HAProxy in front (its own test of the same variable)."""
    return environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _export_lines() -> str:
    """Shell lines that set what is not set yet; for the virtual environment's activate script."""
    wanted: dict[str, str] = {}
    path = Path(__file__).parent.parent / NAME
    if path.is_file():
        wanted = parse(path.read_text(), str(path))
    if {**wanted, **os.environ}.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        wanted["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(HAPROXY_WRAPPER)
        wanted["BRIMFUL_PYTHON"] = sys.executable
    return "\n".join(
        f"export {key}={shlex.quote(value)}" for key, value in wanted.items() if key not in os.environ
    )


_MARK = "# brimful: Ray reads serve.env from the environment"


def _add_to_activate(script: Path) -> None:
    """Add the one line that exports serve.env whenever the environment is activated; once."""
    text = script.read_text()
    if _MARK not in text:
        line = 'eval "$("$VIRTUAL_ENV/bin/python" -I -m serve_app.environment)"'
        script.write_text(f"{text.rstrip()}\n{line}  {_MARK}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--add-to"]:
        _add_to_activate(Path(sys.argv[2]))
    else:
        sys.stdout.write(_export_lines() + "\n")
