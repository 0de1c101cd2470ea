"""Commands in the docs exist: make targets, brimful commands and options, modules, files.

What they print is checked where it is claimed (tests/e2e); here nobody may be sent to a command that
is not there.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$")


def commands(page: Path) -> list[list[str]]:
    found = []
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue  # part of a longer quoted text
            while words and _ASSIGNMENT.match(words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_exist(page: Path) -> None:
    for words in commands(page):
        program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
        shown = " ".join(words)
        if program == "make":
            named = {word for word in arguments if not word.startswith("-") and "=" not in word}
            assert named <= targets(), shown
        elif program == "brimful" and arguments and not arguments[0].startswith("-"):
            assert arguments[0] in {"serve", *cli.SCRIPTS}, shown
        elif program in ("python", "python3") and arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1]) is not None, shown


def test_help_names_every_command_and_shows_examples() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    for name in ("serve", *cli.SCRIPTS):
        assert name in text
    assert "examples:" in text


def test_a_script_that_is_not_written_yet_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["brimful", "plan"])
    if importlib.util.find_spec("scripts.plan") is not None:
        pytest.skip("it is written by now")
    assert cli.main() == 2
    assert "not in this version" in capsys.readouterr().err
