"""Phases for test_audit.py, in a module without torch: a fresh process has it in 0.3 s."""

import os
import subprocess
import time
from typing import Any


def says(say: Any, count: int) -> str:
    for number in range(count):
        say(number)
    return "done"


def raises(say: Any) -> None:
    raise ValueError("wrong")


def dies(say: Any) -> None:
    say("about to")
    os.abort()


def hangs(say: Any) -> None:
    time.sleep(60)


def prints(say: Any) -> None:
    print("a model's greeting", flush=True)


def says_for_ever(say: Any) -> None:
    while True:
        say(os.getpid())
        time.sleep(0.02)


def leaves_a_child(say: Any) -> int:
    return subprocess.Popen(["sleep", "600"]).pid
