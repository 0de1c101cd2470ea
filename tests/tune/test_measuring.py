"""Looks at models whose speed is known, in this process; and the command, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.core.contract import Limits
from scripts.tune import __main__ as tune
from scripts.tune.batched import Batched
from scripts.tune.points import CouldNotRun, Job, Look, Point, Shape
from scripts.tune.process import Worker
from scripts.tune.stepped import Stepped

ROOT = Path(__file__).parents[2]
LOOK_S = 0.25


def job(name: str, *, is_continuous: bool = False, **more: Any) -> Job:
    return Job("toy", f"tests.tune.models:{name}", {}, Limits(), is_continuous, "shared", **more)


async def look(name: str, slots: int, batch: int) -> Look:
    replica = Batched(job(name), Shape(slots, 1), 8)
    await replica.start()
    try:
        return await replica.look(Point(Shape(slots, 1), batch), LOOK_S)
    finally:
        await replica.close()


async def test_a_look_knows_the_rate_of_a_batch_size() -> None:
    """8 items in 21.6 ms, 16 in 43.2: 370 a second each; one in 20.2: 49."""
    replica = Batched(job("Knee"), Shape(), 8)
    started = await replica.start()
    assert started.costs == (1.0, 1.0)
    rates = {n: (await replica.look(Point(Shape(), n), LOOK_S)).rate for n in (1, 8, 16)}
    await replica.close()
    assert rates[1] < 50  # never more than it can; less on a machine that is busy
    assert rates[8] < 372
    assert rates[8] > 3 * rates[1]
    assert 0.5 * rates[8] < rates[16] < 372


async def test_two_slots_help_a_model_that_waits_and_not_one_that_locks() -> None:
    free = [(await look("Knee", slots, 8)).rate for slots in (1, 2)]
    locked = [(await look("Locked", slots, 8)).rate for slots in (1, 2)]
    assert free[1] > 1.4 * free[0]
    assert locked[1] < 1.3 * locked[0]


async def test_a_pool_has_all_its_slots_before_it_is_measured() -> None:
    pool = replace(job("Knee"), safety="pool")
    rates = []
    for slots in (1, 2):
        replica = Batched(pool, Shape(slots, 1), 8)
        await replica.start()
        rates.append((await replica.look(Point(Shape(slots, 1), 8), LOOK_S)).rate)
        await replica.close()
    assert rates[1] > 1.4 * rates[0]


async def test_an_open_loop_tells_a_rate_that_is_carried_from_one_that_is_not() -> None:
    replica = Batched(job("Knee"), Shape(), 8)
    await replica.start()
    calm = await replica.offer(Point(Shape(), 8), 100.0, 0.6, 200.0)
    flood = await replica.offer(Point(Shape(), 1), 400.0, 0.6, 200.0)
    await replica.close()
    assert calm.p99_ms < 200.0
    assert calm.late_share <= 0.01
    assert flood.late_share == 1.0  # ended early


async def test_sequences_that_share_a_step_are_counted() -> None:
    replica = Stepped(job("Stepper", is_continuous=True), Shape(), 8)
    await replica.start()
    one, eight = [await replica.look(Point(Shape(), n, 256.0), LOOK_S) for n in (1, 8)]
    await replica.close()
    assert eight.rate > 2 * one.rate
    assert eight.size > 6
    assert one.p99_ms > 4.0


async def test_a_model_without_items_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"no examples\(\): add a method .* or give --inputs"):
        await Batched(job("Mute"), Shape(), 8).start()
    items = tmp_path / "items.jsonl"
    items.write_text('1.5\n\n"two"\n')
    with pytest.raises(CouldNotRun, match=r"line 3 of items.jsonl fails"):
        await Batched(job("Mute", inputs=str(items)), Shape(), 8).start()


CONFIG = """applications:
  - name: knee
    route_prefix: /knee
    import_path: serve_app.builder:dynamic
    args:
      model: tune_models:{model}
      max_batch_size: 2   # so far
      safety: {safety}
    deployments: [{{name: model}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's, outside of the repository."""
    (tmp_path / "tune_models.py").write_text((ROOT / "tests/tune/models.py").read_text())
    return tmp_path


def config(folder: Path, model: str = "Knee", safety: str = "exclusive") -> Path:
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(model=model, safety=safety))
    return file


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.tune", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_the_command_finds_the_knee_and_writes_it_with_its_reason(folder: Path) -> None:
    file = config(folder)
    running = command(folder, "knee", "--budget-s", "18", "--no-variants", "--json", "--write")
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0, err
    found = json.loads(out)
    assert found["decided"]
    assert found["chosen"]["max_batch_size"] in (8, 16, 32)
    assert found["gain"]["low"] > 1.0
    text = file.read_text()
    assert f"max_batch_size: {found['chosen']['max_batch_size']}   # so far" in text
    assert "# tune: max_batch_size" in text
    assert "of 18 s  batch 4:" in err  # not a terminal: plain lines


def test_ctrl_c_shows_what_is_known_and_leaves_no_process(folder: Path) -> None:
    config(folder)
    running = command(folder, "knee", "--budget-s", "60")
    assert running.stderr is not None
    for line in running.stderr:
        if "batch 2:" in line:
            break
    os.killpg(running.pid, signal.SIGINT)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "stopped before the end; the best so far" in out
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of its group is left")


def test_a_model_that_raises_could_not_run_and_says_why() -> None:
    worker = Worker(job("Raises", folders=(str(ROOT),)), Shape(), 8)
    try:
        with pytest.raises(CouldNotRun, match="no such weights"):
            worker.ready()
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kne"], "no application 'kne': did you mean 'knee'?"),
        (["knee", "--config", "none.yaml"], "there is no none.yaml"),
        (["knee", "--inputs", "none.jsonl"], "there is no file none.jsonl"),
        (["none.py:Knee"], "there is no file none.py"),
        (["tune_models.py:Knee", "--write"], "--write needs an application"),
        (["knee", "--grid", "--objective", "latency"], "--grid measures throughput"),
    ],
)
def test_what_can_not_run_is_said_before_anything_starts(
    folder: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config(folder)
    monkeypatch.chdir(folder)
    assert tune.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_config_that_does_not_pass_its_check_is_refused_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = config(folder)
    file.write_text(file.read_text().replace("max_batch_size", "max_bach_size"))
    monkeypatch.chdir(folder)
    assert tune.main(["knee"]) == 2
    assert "did you mean 'max_batch_size'?" in capsys.readouterr().err


def test_help_shows_examples(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        tune.main(["--help"])
    assert end.value.code == 0
    assert "python -m scripts.tune embed --write" in capsys.readouterr().out
