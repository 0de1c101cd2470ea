"""Whose processes a start ends: those of the recorded server, whatever has become of its numbers."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app import launcher, processes, rundir
from serve_app.ports import take_block
from serve_app.rundir import RunDir

ORPHAN = ["sh", "-c", "sleep 60 & exit 0"]
"""Leader of a session that leaves a member behind, as a killed server does."""


@pytest.fixture
def orphaned() -> Iterator[Callable[[str], int]]:
    """Starts a session whose leader is gone, its member's environment marked; returns its number."""
    sessions: list[int] = []

    def start(mark: str) -> int:
        leader = subprocess.Popen(ORPHAN, start_new_session=True, env={**os.environ, processes.MARK: mark})
        leader.wait(10)
        sessions.append(leader.pid)
        deadline = time.monotonic() + 5
        # until it is `sleep`: between fork and exec the environment is the shell's
        while [p.name for p in processes.session_members(leader.pid)] != ["sleep"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return leader.pid

    yield start
    for session in sessions:
        for process in processes.session_members(session):
            processes.send(process.pid, 9)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    monkeypatch.setattr(rundir, "_base", lambda: tmp_path)
    run_dir = RunDir(8000)
    yield run_dir
    run_dir.close()


def test_what_a_killed_server_left_is_ended(orphaned: Callable[[str], int], run_dir: RunDir) -> None:
    session = orphaned("ours")
    run_dir.write_record(session, "ours")
    assert run_dir.end_leftovers() == ["sleep"]
    assert processes.session_members(session) == []
    assert run_dir.end_leftovers() == []


def test_a_stranger_with_the_recorded_session_number_is_left_alone(
    orphaned: Callable[[str], int], run_dir: RunDir
) -> None:
    """The server's number went to a stranger, whose own leader is gone too: only the mark tells."""
    session = orphaned("somebody else's")
    run_dir.write_record(session, "ours")
    assert run_dir.end_leftovers() == []
    assert [p.name for p in processes.session_members(session)] == ["sleep"]


def test_a_stranger_who_is_leader_now_is_left_alone(run_dir: RunDir) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        try:
            assert not processes.is_ours(stranger.pid, 1, "ours")
            assert processes.end_session(stranger.pid, 1, "ours", term_s=0) == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_record_of_an_earlier_boot_names_nobody(
    orphaned: Callable[[str], int], run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = orphaned("ours")
    record = run_dir.write_record(session, "ours")
    assert len(record.boot_id) == 36
    assert rundir._is_alive(record)
    assert not rundir._is_alive(replace(record, boot_id="another"))
    monkeypatch.setattr(processes, "boot_id", lambda: "another")
    assert run_dir.end_leftovers() == []
    assert len(processes.session_members(session)) == 1


def test_a_record_without_a_mark_names_nobody(run_dir: RunDir) -> None:
    (run_dir.path / "server.json").write_text('{"launcher": 1, "server": 1, "server_ticks": 1}')
    assert run_dir.end_leftovers() == []


def test_an_ended_leader_that_is_not_waited_for_keeps_its_number() -> None:
    child = subprocess.Popen(ORPHAN, start_new_session=True)
    leader = processes.read(child.pid)
    assert leader is not None
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert processes.is_ours(child.pid, leader.start_ticks, "no mark")
    assert processes.end_session(child.pid, leader.start_ticks, "no mark", term_s=0) == []
    assert processes.session_members(child.pid) == []
    child.wait()


def test_the_launcher_sees_the_end_without_taking_the_status() -> None:
    child = subprocess.Popen(["sh", "-c", "exit 3"])
    deadline = time.monotonic() + 10
    while not launcher._has_ended(child.pid):
        assert time.monotonic() < deadline
    assert launcher._has_ended(child.pid)
    assert child.wait() == 3
    assert launcher._has_ended(child.pid)


def test_the_servers_environment_has_the_mark_and_keeps_it(run_dir: RunDir) -> None:
    block = take_block()
    try:
        environ = launcher._child_environment(run_dir, block, "abc")
    finally:
        block.close()
    assert environ[processes.MARK] == "abc"
    assert environ["SPT_NOENV"] == "1"
