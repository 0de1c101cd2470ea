"""What the docs tell people to type does what the docs say: curl lines and clients, on the real server."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Server

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    "README.md",
    "docs/howto/own-model.md",
    "docs/howto/chat.md",
    "docs/howto/audio-streams.md",
    "docs/howto/step-wise-model.md",
    "docs/reference/http.md",
)
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = ("curl ", "tail ")


def documented() -> list[tuple[str, str, list[str]]]:
    """(page, command, expected lines of its answer); they are the comments right below it."""
    found = []
    for page in PAGES:
        for block in FENCE.findall((ROOT / page).read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            for i, line in enumerate(lines):
                if line.startswith(COMMANDS):
                    below = itertools.takewhile(lambda line: line.startswith("# "), lines[i + 1 :])
                    found.append((page, line, [comment[2:] for comment in below]))
    return found


def on(server: Server, text: str) -> str:
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(
        "localhost:8000", f"127.0.0.1:{server.port}"
    )


def same(value: object, expected: object) -> bool:
    """Equal but for the last digits of numbers, which depend on the machine."""
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return abs(value - expected) < 0.002
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in expected)
    return value == expected


def check_cut(answer: str, expected: str) -> None:
    """A line that was cut for the page: the numbers before the first cut are there, and all of the text."""
    start, *others = expected.split("...")
    numbers = [round(float(n), 2) for n in re.findall(r"-?\d+\.\d+", start)]
    got = [round(float(n), 2) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", answer)][: len(numbers)]
    assert got == pytest.approx(numbers, abs=0.011)
    assert re.sub(r"-?\d+\.\d+", "n", start).rstrip(", ")[:12] == re.sub(r"-?\d+\.\d+", "n", answer)[:12]
    for part in others:
        assert part.strip(" ,") in answer


@pytest.mark.parametrize(("page", "command", "expected"), documented())
def test_a_documented_curl_line_gives_what_it_says(
    server: Server, page: str, command: str, expected: list[str]
) -> None:
    run = subprocess.run(
        ["bash", "-c", f"{on(server, command)} -sS --fail-with-body"],
        capture_output=True,
        cwd=ROOT,
        check=False,
        timeout=90,
    )
    answer = run.stdout.decode()
    assert run.returncode == 0, answer + run.stderr.decode()
    shown = list(itertools.takewhile(lambda line: line != "...", expected))
    if shown == expected and expected:
        assert len(answer.splitlines()) == len(expected), answer
    for line, wanted in zip(answer.splitlines(), shown, strict=False):
        if "..." in wanted:
            check_cut(line, wanted)
        else:
            assert same(json.loads(line), json.loads(wanted)), answer


def test_the_readme_has_a_curl_line_for_each_model() -> None:
    commands = [command for page, command, _ in documented() if page == "README.md"]
    for app in ("embed", "classify", "chat", "vad"):
        assert any(f"/{app}/" in command for command in commands)


SHORTER = {
    "max_completion_tokens=100": "max_completion_tokens=8",
    "max_completion_tokens=50": "max_completion_tokens=4",
    "max_tokens=50": "max_tokens=4",
    "    stream=True,\n": "    stream=True, max_tokens=8,\n",
    "range(16)": "range(4)",
    "asyncio.sleep(0.32)": "asyncio.sleep(0.001)",
}
"""The same calls, with fewer tokens and less waiting."""


@pytest.mark.parametrize(
    ("page", "prints"),
    [
        ("docs/howto/chat.md", ["CompletionUsage(", "name='Paris'"]),
        ("docs/howto/audio-streams.md", ["{'t_s': 0.032, 'speech': 0.0266", "'t_s': 3.072"]),
    ],
)
def test_a_documented_client_runs(server: Server, page: str, prints: list[str]) -> None:
    """All Python of a page, one block behind the other as its reader types them."""
    code = on(server, "\n".join(PYTHON_FENCE.findall((ROOT / page).read_text())))
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=110
    )
    assert run.returncode == 0, run.stderr
    for part in prints:
        assert part in run.stdout
