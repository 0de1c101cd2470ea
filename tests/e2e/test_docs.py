"""What the docs tell people to type does what the docs say: every curl line, against the real server."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Server

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "docs/howto/own-model.md", "docs/reference/http.md")
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documented() -> list[tuple[str, str, str | None]]:
    """(page, curl command, expected answer or None); an expected answer is a comment right below."""
    found = []
    for page in PAGES:
        for block in FENCE.findall((ROOT / page).read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            for line, below in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith("curl "):
                    expected = below[2:] if below.startswith("# ") else None
                    found.append((page, line, expected))
    return found


def same(value: object, expected: object) -> bool:
    """Equal but for the last digits of numbers, which depend on the machine."""
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return abs(value - expected) < 0.002
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in expected)
    return value == expected


@pytest.mark.parametrize(("page", "command", "expected"), documented())
def test_a_documented_curl_line_gives_what_it_says(
    server: Server, page: str, command: str, expected: str | None
) -> None:
    command = command.replace("http://127.0.0.1:8000", server.url).replace(
        "localhost:8000", f"127.0.0.1:{server.port}"
    )
    run = subprocess.run(
        [*shlex.split(command), "-sS"], capture_output=True, cwd=ROOT, check=True, timeout=30
    )
    if expected is None:
        return
    answer = run.stdout.decode()
    if "..." in expected:  # cut for the page: the numbers before the cut must be there
        start = expected.split("...")[0]
        numbers = [round(float(n), 2) for n in re.findall(r"-?\d+\.\d+", start)]
        got = [round(float(n), 2) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", answer)][: len(numbers)]
        assert got == pytest.approx(numbers, abs=0.011)
        assert re.sub(r"-?\d+\.\d+", "n", start).rstrip(", ")[:12] == re.sub(r"-?\d+\.\d+", "n", answer)[:12]
    else:
        assert same(json.loads(answer), json.loads(expected)), answer


def test_the_readme_has_a_curl_line_for_each_model() -> None:
    commands = [command for page, command, _ in documented() if page == "README.md"]
    assert any("/embed/" in c for c in commands)
    assert any("/classify/" in c for c in commands)
