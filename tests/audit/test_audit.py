"""The audit as a whole: fresh processes, the verdict, the command; unsafe files are told from safe ones."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.audit import report as reports
from deployments.audit import store
from deployments.audit.audit import PHASES, name_of, names_of
from deployments.audit.findings import PROPERTIES, Property
from deployments.audit.forks import CantCross, Failed, in_fork
from deployments.audit.histories import (
    compare_orders,
    is_steady,
    with_history,
    without_steadiness,
)
from deployments.audit.instances import known_of
from deployments.audit.overlaps import races_of
from deployments.audit.phases import batches, orders
from deployments.audit.process import Outcome, run_phase
from deployments.audit.races import STORM
from deployments.audit.sameness import same, snapshot
from deployments.audit.subject import calls_of, load
from deployments.audit.target import Input, Known, Target
from deployments.audit.verdict import batching_of, fails, mode_of, verdict_of
from deployments.runtime.model_class import ModelClassError
from scripts import audit as command

FOLDER = Path(__file__).parents[2]
KINDS = str(Path(__file__).with_name("kinds.py"))
SMALL = ["--budget-s", "6"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = command.main(arguments)
    return status, capsys.readouterr().out


# The command


def test_unsafe_model_gets_its_proof_and_the_replay_shows_it_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    status, out = ask(capsys, f"{KINDS}:GlobalDict", *SMALL, "--json", "--markdown", str(page))
    report = json.loads(out)
    assert status == 1
    assert (report["verdict"], report["mode"], report["batching"]) == ("unsafe", "processes", "dynamic")
    assert set(report["properties"]) == set(PROPERTIES)
    proof = report["properties"]["thread_safe"]["evidence"][0]
    write = proof["writes"][0]
    line = Path(write["file"]).read_text().splitlines()[write["line"] - 1]
    assert (write["attribute"], line.strip()) == ("GLOBAL", 'GLOBAL["x"] = x')
    assert report["properties"]["copy_safe"]["holds"] is False
    assert "# " in page.read_text()
    assert proof["replay"] in page.read_text()
    status, shown = ask(capsys, "--replay", proof["replay"])
    assert status == 1
    assert "thread A" in shown
    assert "another answer than alone" in shown
    assert line.strip() in shown
    assert "  alone  " in shown


@pytest.mark.slow  # 30 s: one whole audit is enough for every run
def test_module_of_a_factory_is_audited_with_the_examples_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "nets.py"
    file.write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()\n"
        "def examples():\n"
        "    return [torch.ones(4), torch.arange(4.0)]\n"
    )
    status, out = ask(capsys, f"{file}:make", *SMALL)
    assert status == 0, out
    assert "safe as tested" in out
    assert "mode shared" in out
    assert "batch of 8" in out


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere.py:Model", "there is no file"),
        ("no_application", "has no application 'no_application'"),
        (f"{KINDS}:Fails", "ValueError: weights are missing"),
        (KINDS, "say which class or function of it"),
        ("no_such_file.py", "there is no file"),
        (__file__.replace("test_audit.py", "weights.pt"), "there is no file"),
        ("no.such.module:Model", "importing no.such.module raised ModuleNotFoundError"),
        ("nothing:", "not of the form"),
    ],
)
def test_what_can_not_be_audited_says_why(
    target: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert command.main([target, *SMALL]) == 2
    assert says in capsys.readouterr().err


def test_gpu_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main([f"{KINDS}:CleanCnn", "--device", "cuda", *SMALL]) == 2
    assert "finds no GPU here; leave --device out" in capsys.readouterr().err


def test_replay_of_an_unknown_race_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--replay", "0000000000"]) == 2
    assert "audit the model again" in capsys.readouterr().err


# Processes

SMALL_PHASES = "tests.audit.small_phases"


def test_phase_gives_its_value_and_what_it_said() -> None:
    said: list[Any] = []
    outcome = run_phase(f"{SMALL_PHASES}:says", 3, limit_s=60.0, on_said=said.append)
    assert (outcome.value, said, outcome.error) == ("done", [0, 1, 2], "")


def test_phase_that_raises_dies_or_hangs_is_told_apart() -> None:
    raised = run_phase(f"{SMALL_PHASES}:raises", limit_s=60.0)
    assert raised.error.startswith("ValueError: wrong")
    died = run_phase(f"{SMALL_PHASES}:dies", limit_s=60.0)
    assert (died.died, died.last, died.error) == (True, "about to", "its process ended with SIGABRT")
    began = time.monotonic()
    hung = run_phase(f"{SMALL_PHASES}:hangs", limit_s=1.0)
    assert "longer than 1 s" in hung.error
    assert time.monotonic() - began < 20


def test_what_a_model_prints_is_no_part_of_the_report(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_phase(f"{SMALL_PHASES}:prints", limit_s=60.0).error == ""
    assert "greeting" not in capfd.readouterr().out


def test_phase_ends_when_the_audit_is_stopped() -> None:
    stopped = threading.Event()
    outcome = run_phase(
        f"{SMALL_PHASES}:says_for_ever", limit_s=60.0, stopped=stopped, on_said=lambda said: stopped.set()
    )
    assert outcome.error == "the audit was stopped"
    assert is_gone(outcome.last)


def test_what_a_phase_started_ends_with_it() -> None:
    assert is_gone(run_phase(f"{SMALL_PHASES}:leaves_a_child", limit_s=60.0).value)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_audit_that_is_ended_leaves_no_process(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\n"
        "class Slow:\n"
        "    def load(self, device):\n"
        f"        pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    def forward(self, batch): return batch\n"
    )
    command = [sys.executable, "-m", "scripts.audit", str(tmp_path / "slow.py") + ":Slow"]
    audit = subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.DEVNULL)
    while not (pid_file.exists() and pid_file.read_text()):
        assert audit.poll() is None
        time.sleep(0.05)
    audit.send_signal(sent)
    assert audit.wait(60) == status
    assert is_gone(int(pid_file.read_text()))


def is_gone(pid: int) -> bool:
    """Waits for it; a zombie that nobody has asked for counts as gone."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(1200):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# What the properties add up to


def properties(*false: str, unknown: tuple[str, ...] = ()) -> dict[str, Property]:
    return {name: Property(None if name in unknown else name not in false, "because") for name in PROPERTIES}


@pytest.mark.parametrize(
    ("false", "unknown", "mode", "batching"),
    [
        ((), (), "shared", "dynamic"),
        (("cold_start_safe",), (), "pool", "dynamic"),
        ((), ("cold_start_safe",), "shared", "dynamic"),
        (("thread_safe",), (), "pool", "dynamic"),
        (("thread_safe", "copy_safe"), (), "processes", "dynamic"),
        (("thread_safe", "copy_safe", "order_independent"), (), "exclusive", "dynamic"),
        ((), ("thread_safe",), "pool", "dynamic"),
        ((), ("thread_safe", "copy_safe"), "processes", "dynamic"),
        (("batch_invariant",), (), "shared", "per_item"),
        (("padding_invariant",), (), "shared", "per_item"),
        ((), ("padding_invariant",), "shared", "dynamic"),
        ((), ("batch_invariant",), "shared", "per_item"),
    ],
)
def test_mode_and_batching_follow_from_what_was_shown(
    false: tuple[str, ...], unknown: tuple[str, ...], mode: str, batching: str
) -> None:
    found = properties(*false, unknown=unknown)
    assert (mode_of(found), batching_of(found)) == (mode, batching)
    assert fails(found) == bool(false)


def test_words_are_never_plain_safe() -> None:
    write = {"attribute": "self.x", "of": "M", "file": "m.py", "line": 1}
    assert verdict_of(properties(), []) == "safe as tested"
    assert verdict_of(properties(), [write]) == "writes, no effect found"
    assert verdict_of(properties("thread_safe"), [write]) == "unsafe"
    assert verdict_of(properties("cold_start_safe"), []) == "unsafe"
    assert verdict_of(properties(unknown=("thread_safe",)), []) == "undecided"


def test_report_that_decided_nothing_takes_no_others_place(tmp_path: Path) -> None:
    decided = {"key": "k", "weights": None, "verdict": "safe as tested", "properties": {}}
    race = {"copy_safe": {"evidence": [{"replay": "abc"}]}}
    store.save(decided)
    store.save({**decided, "verdict": "undecided", "properties": race})
    assert store.find("k") == decided
    assert store.find_race("abc") is not None
    elsewhere = {**decided, "key": "other", "properties": {"copy_safe": {"evidence": [{"replay": "def"}]}}}
    store.save(elsewhere, tmp_path)
    assert store.find_race("def") is None
    assert store.find_race("def", tmp_path) is not None


def test_nine_calls_in_flight_have_nine_names() -> None:
    assert len({name_of(thread) for thread in range(STORM)}) == STORM


def test_mappings_are_the_same_by_what_they_hold() -> None:
    answer = OrderedDict(a=torch.ones(2), b=1.0)
    assert same(snapshot(answer), answer)
    assert not same({"a": torch.ones(2)}, {"a": torch.zeros(2)})


def test_answer_that_can_not_cross_to_another_process_is_said_to() -> None:
    class Local:
        pass

    with pytest.raises(CantCross):
        in_fork(Local)
    with pytest.raises(Failed, match="ValueError: no"):
        in_fork(lambda: raise_no())


def raise_no() -> None:
    raise ValueError("no")


LOCAL = """
import torch
from dataclasses import dataclass

def made():
    @dataclass
    class Answer:
        y: float
    return Answer

class M:
    def load(self, device):
        self.answer = made()
    def forward(self, batch):
        return batch.sum(1)
    def split(self, outputs, n):
        return [self.answer(float(y)) for y in outputs]
    def postprocess(self, answer):
        return answer.y
    def examples(self):
        return [[1.0, 2.0], [3.0, 4.0]]
"""


def test_answers_of_a_class_that_can_not_be_pickled_are_compared_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(LOCAL)
    target = Target(f"{tmp_path}/m.py:M")
    found = in_fork(lambda: batches(lambda said: None, target, known_of(load(target)), 2.0))
    assert found["batch_invariant"].holds is True


def test_weights_of_a_model_with_an_uninitialised_buffer_are_not_told_apart(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\n"
        "class M:\n"
        "    def load(self, device):\n"
        "        self.net = torch.nn.Linear(4, 4)\n"
        "        with torch.no_grad():\n"
        "            self.net.weight.fill_(1.0), self.net.bias.fill_(1.0)\n"
        "        self.buffer = torch.empty(64, 16)\n"
        "    def forward(self, batch):\n"
        "        return self.net(batch)\n"
        "    def examples(self):\n"
        "        return [[1.0] * 4, [2.0] * 4]\n"
    )
    target = Target(f"{tmp_path}/m.py:M")
    alone, written = (run_phase(f"{PHASES}:{name}", target, limit_s=60.0) for name in ("alone", "writes"))
    assert alone.value["weights"] != written.value["weights"]


def test_race_kept_before_slow_models_were_told_apart_can_be_read() -> None:
    known = Known.from_json({"calls": [[[0, ""]]], "is_random": False, "repeats": True})
    assert not known.is_slow


def of_orders(*answers: tuple[int, str]) -> Outcome:
    return Outcome(list(answers))


def test_answer_that_follows_the_order_of_calls_is_found_across_processes() -> None:
    alone = {"calls": [["examples()[0]"], ["examples()[1]"]], "writes": [], "first_writes": []}
    same = [of_orders((0, "a"), (1, "b")), of_orders((1, "b"), (0, "a"))]
    assert compare_orders(same, alone).holds is True
    other = [of_orders((0, "a"), (1, "b")), of_orders((1, "c"), (0, "a"))]
    found = compare_orders(other, alone)
    assert found.holds is False
    assert found.evidence[0]["answers"] == 2
    assert compare_orders([Outcome(error="it died")], alone).holds is None


def test_largest_value_seen_is_history_though_it_saturates() -> None:
    target = Target(f"{KINDS}:LargestSeenOnSelf")
    known = known_of(load(target))
    outlier = next(n for n, batch in enumerate(known.calls) if batch[0].change == "x-100")
    outcomes = [Outcome(one) for one in orders(lambda said: None, target, known, (0, outlier), 0.0)]
    alone = {"calls": names_of(known), "writes": [], "first_writes": []}
    assert compare_orders(outcomes, alone).holds is False


def test_history_of_calls_is_history_of_other_threads_calls() -> None:
    found = with_history(properties("order_independent"))
    assert (found["thread_safe"].holds, found["cold_start_safe"].holds) == (False, False)
    assert (found["copy_safe"].holds, found["batch_invariant"].holds) == (True, True)
    assert found["deterministic"].holds is True
    assert with_history(properties("copy_safe")) == properties("copy_safe")


def test_race_of_copies_that_needs_what_came_before_may_be_their_own_history() -> None:
    race = Property(False, "race", [{"replay": "abc", "prefix": (0, 70)}])
    assert with_history({**properties(), "copy_safe": race})["copy_safe"].holds is False
    assert with_history({**properties("order_independent"), "copy_safe": race})["copy_safe"].holds is None
    shared = Property(False, "race", [{"replay": "abc", "prefix": (0, 70), "across": 1}])
    assert with_history({**properties("order_independent"), "copy_safe": shared})["copy_safe"].holds is False


def test_second_instance_that_knows_what_the_first_was_asked_is_found() -> None:
    def differing(name: str) -> list[int]:
        target = Target(f"{KINDS}:{name}")
        found: list[int] = []
        known = in_fork(lambda: known_of(load(target)))  # what it calls is seen for ever
        races_of(target, known, "copies", on_across=found.append)
        return found

    assert in_fork(lambda: differing("GlobalMaximum"))
    assert in_fork(lambda: differing("CounterAddedToInput")) == []


def test_what_differs_in_processes_that_did_the_same_decides_nothing() -> None:
    assert is_steady([of_orders((0, "a")), of_orders((0, "a"), (0, "a"))])
    assert not is_steady([of_orders((0, "a")), of_orders((0, "b"))])
    found = without_steadiness(properties("thread_safe"))
    assert (found["thread_safe"].holds, found["deterministic"].holds) == (None, False)


def test_every_property_has_a_question_and_a_cure() -> None:
    assert set(reports.QUESTIONS) == set(reports.CURES) == set(PROPERTIES)


# Inputs


def test_calls_differ_in_values_size_and_shape() -> None:
    target = Target("tests.audit.kinds:MeanPoolingWithMask", folder=str(Path(__file__).parents[2]))
    subject = load(target)
    calls = calls_of(subject)
    assert (Input(0),) in calls
    assert any(len(batch) > 1 for batch in calls)
    assert any(item.change == "x-100" for batch in calls for item in batch)
    assert len({subject.length(batch[0]) for batch in calls}) > 1


def test_model_without_examples_and_inputs_is_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "class Bare:\n    def load(self, device): ...\n    def forward(self, batch): return batch\n"
    )
    with pytest.raises(ModelClassError, match="add `def examples"):
        load(Target("bare.py:Bare", folder=str(tmp_path)))


def test_declared_inputs_stand_in_for_examples(tmp_path: Path) -> None:
    (tmp_path / "declared.py").write_text(
        "class Declared:\n"
        "    inputs = [('x', 'FP32', [-1, 3])]\n"
        "    def load(self, device): ...\n"
        "    def forward(self, batch): return batch * 2\n"
    )
    subject = load(Target("declared.py:Declared", folder=str(tmp_path)))
    assert len(subject.examples) == 3
    assert len(subject.call((Input(0), Input(1)))) == 2


# Reports kept


@pytest.fixture
def report() -> dict[str, Any]:
    race = {"replay": "abc", "kind": "threads", "trial": {}, "calls": {}, "writes": []}
    return {
        "target": "m.py:M",
        "model": {"model": "m.py:M"},
        "properties": {"thread_safe": {"holds": False, "reason": "r", "evidence": [race]}},
    }


def test_report_is_found_by_its_races_and_replaced_by_the_next(report: dict[str, Any]) -> None:
    report["key"] = "of this model"
    first = store.save(report)
    assert store.find_race("abc") == (report, report["properties"]["thread_safe"]["evidence"][0])
    report["properties"]["thread_safe"]["evidence"] = []
    assert store.save(report) == first
    assert store.find_race("abc") is None


def test_name_that_a_file_has_not_is_told_with_those_that_it_has() -> None:
    with pytest.raises(ModelClassError, match=r"has no Nothing; it has .*AttentionWithMask"):
        load(Target(f"{KINDS}:Nothing"))


def test_instances_of_one_file_share_its_globals() -> None:
    target = Target(f"{KINDS}:GlobalDict")
    first, second = load(target), load(target)
    first.call((Input(0),))
    module = type(first.instance).forward.__globals__
    assert module is type(second.instance).forward.__globals__


@pytest.mark.parametrize("own", ["    def load(self, device): ...\n", ""])
def test_module_class_is_audited_with_and_without_load(own: str, tmp_path: Path) -> None:
    (tmp_path / "modules.py").write_text(
        "import torch\n"
        "class Doubles(torch.nn.Module):\n" + own + "    def forward(self, batch): return batch * 2\n"
        "    def examples(self): return " + ("[[1.0, 2.0]]" if own else "[torch.ones(2)]") + "\n"
    )
    subject = load(Target("modules.py:Doubles", folder=str(tmp_path)))
    ((_, shown),) = subject.call((Input(0),))
    assert shown == [2.0 * x for x in ([1.0, 2.0] if own else [1.0, 1.0])]
