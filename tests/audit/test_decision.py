"""From a verdict to how a replica uses its model, and when a verdict still holds."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from deployments.audit import deploy, store
from deployments.audit.decision import Asked, BatchingRefused, decide
from deployments.audit.identity import _version, code_key
from deployments.audit.target import Target


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def report(mode: str = "shared", batching: str = "dynamic", **holds: bool | None) -> dict[str, Any]:
    names = ("thread_safe", "copy_safe", "order_independent", "batch_invariant", "padding_invariant")
    properties = {n: {"holds": holds.get(n, True), "reason": f"why {n}", "evidence": []} for n in names}
    verdict = "safe as tested" if mode == "shared" else "unsafe"
    return {"mode": mode, "batching": batching, "verdict": verdict, "properties": properties}


@pytest.mark.parametrize(
    ("mode", "slots", "is_whole", "in_order"),
    [
        ("shared", 4, False, False),
        ("pool", 4, True, False),
        ("processes", 1, True, False),
        ("exclusive", 1, True, True),
    ],
)
def test_auto_applies_the_verdict(mode: str, slots: int, is_whole: bool, in_order: bool) -> None:
    decision = decide(Asked(slots=4), report(mode))
    sharing = decision.sharing
    assert (sharing.mode, sharing.slots, sharing.is_whole, sharing.in_order) == (
        mode,
        slots,
        is_whole,
        in_order,
    )
    assert any("num_replicas: 4" in warning for warning in decision.warnings) is (slots == 1)


def test_a_mode_that_is_named_wins_and_says_what_the_audit_found() -> None:
    decision = decide(Asked("shared", 2), report("processes", copy_safe=False))
    assert (decision.sharing.mode, decision.sharing.slots) == ("shared", 2)
    assert "audit says processes" in decision.warnings[0]
    assert "why copy_safe" in decision.warnings[0]
    assert decision.sharing.stats()["warning"] == decision.warnings[0]
    assert "warning" not in decide(Asked("auto", 2), report("shared")).sharing.stats()
    assert not decide(Asked("exclusive"), report("shared")).warnings  # more careful than it must be


def test_batches_that_were_asked_for_are_refused_where_mates_matter() -> None:
    found = report(batching="per_item", batch_invariant=False)
    with pytest.raises(
        BatchingRefused, match=r"max_batch_size: .*why batch_invariant.*allow_batch_dependence: true"
    ):
        decide(Asked(batches=True), found)
    with pytest.raises(BatchingRefused):
        decide(Asked("shared", batches=True), found)
    alone = decide(Asked(), found)
    assert alone.sharing.max_batch_size == 1
    assert "one by one, since why batch_invariant" in alone.warnings[0]
    allowed = decide(Asked(batches=True, allow_batch_dependence=True), found)
    assert allowed.sharing.max_batch_size is None
    assert "why batch_invariant" in allowed.warnings[0]


def test_slots_that_gain_nothing_are_said_to() -> None:
    found = report("pool") | {"measured": {"speed_up": {"pool_of_2": 0.97}}}
    (warning,) = decide(Asked(slots=2), found).warnings
    assert "gained 0.97 times" in warning
    assert "num_replicas" in warning
    assert not decide(Asked(slots=1), found).warnings
    assert not decide(Asked(slots=2), found | {"measured": {"speed_up": {"pool_of_2": 1.4}}}).warnings


def test_padding_that_matters_is_a_batch_that_matters() -> None:
    found = report(batching="per_item", padding_invariant=False)
    with pytest.raises(BatchingRefused, match="why padding_invariant"):
        decide(Asked(batches=True), found)


def test_what_could_not_be_decided_runs_one_by_one_and_is_not_refused() -> None:
    found = report(batching="per_item", batch_invariant=None)
    assert decide(Asked(batches=True), found).sharing.max_batch_size == 1
    proven = report(batching="per_item", batch_invariant=None, padding_invariant=False)
    with pytest.raises(BatchingRefused, match="why padding_invariant"):
        decide(Asked(batches=True), proven)


def test_without_a_verdict_the_authors_word_counts_and_that_is_said() -> None:
    decision = decide(Asked(), {"failed": "it has no examples()"})
    assert (decision.sharing.mode, decision.sharing.max_batch_size) == ("exclusive", None)
    assert "no examples()" in decision.warnings[0]
    assert decide(Asked("pool", 3), None).sharing.slots == 3


# When a verdict holds

MODEL = '''
import helper
class Model:
    """Says what it is."""
    def load(self, device): pass
    def forward(self, batch): return batch * helper.FACTOR  # times
    def examples(self): return [1.0]
'''


@pytest.fixture
def target(tmp_path: Path) -> Target:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("FACTOR = 2\n")
    return Target("model:Model", folder=str(tmp_path))


def test_the_key_changes_with_code_and_arguments_and_not_with_comments(target: Target) -> None:
    folder = Path(target.folder)
    first = code_key(target)
    (folder / "model.py").write_text(MODEL.replace("# times", "# product").replace("Says", "Tells"))
    assert code_key(target) == first
    assert code_key(Target("model.py:Model", folder=target.folder)) == first
    assert code_key(Target("model:Model", {"a": 1}, target.folder)) != first
    assert code_key(Target("model:Model", folder=target.folder, optimise=("bf16",))) != first
    (folder / "helper.py").write_text("FACTOR = 3\n")
    assert code_key(target) != first


def test_the_key_sees_packages_and_torch(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / "sub").mkdir(parents=True)
    files = {
        "pkg/__init__.py": "from .impl import Model\n",
        "pkg/impl.py": MODEL.replace("import helper", "from .sub import part\nfrom . import sub as helper"),
        "pkg/sub/__init__.py": "FACTOR = 2\n",
        "pkg/sub/part.py": "X = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    target = Target("pkg:Model", folder=str(tmp_path))
    keys = {code_key(target)}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "Y = 1\n")
        keys.add(code_key(target))
    assert len(keys) == 5
    assert _version("torch")
    assert "pillow" in _version("PIL")


def test_arguments_that_can_not_be_told_apart_later_are_named(target: Target) -> None:
    found = deploy.verdict_of(Target("model:Model", {"when": object()}, target.folder), "w")
    assert "model_args" in found["failed"]


def test_a_failed_audit_is_tried_again_at_the_next_start(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(asked: Target, *_: Any) -> dict[str, Any]:
        ran.append(asked.model)
        return {"failed": "it took longer than 80 s"}

    monkeypatch.setattr(deploy, "run_apart", run)
    assert [deploy.verdict_of(target, "w")["failed"] for _ in range(2)] == ["it took longer than 80 s"] * 2
    assert len(ran) == 2


def test_a_store_that_can_not_be_written_stops_nobody(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(deploy, "run_apart", lambda *_: report())
    assert deploy.verdict_of(target, "w")["mode"] == "shared"


def test_a_verdict_holds_for_its_weights(target: Target) -> None:
    key = code_key(target)
    store.save({"key": key, "weights": "abc", "mode": "shared"})
    assert store.find(key, "abc") is not None
    assert store.find(key, "def") is None
    store.save({"key": key, "weights": None, "mode": "shared"})  # made anew at each load
    assert store.find(key, "def") is not None


def test_a_damaged_report_is_no_report(target: Target) -> None:
    file = store.save({"key": code_key(target), "weights": None})
    file.write_text(json.dumps([1])[:-1])
    assert store.find(code_key(target)) is None


def test_replicas_of_one_model_audit_it_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(asked: Target, *_: Any) -> dict[str, Any]:
        ran.append(asked.model)
        return report()

    monkeypatch.setattr(deploy, "run_apart", run)  # an audit takes half a minute; tests/audit runs real ones
    found: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: found.append(deploy.verdict_of(target, "w"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 1
    assert [one["mode"] for one in found] == ["shared"] * 3
    deploy.verdict_of(target, "other weights")
    assert len(ran) == 2


def test_a_model_without_source_is_said_to_be_unaudited() -> None:
    found = deploy.verdict_of(Target("nowhere:Model"), "w")
    assert "no source" in found["failed"]
    assert deploy.stored_verdict(Target("nowhere:Model"), "w") is None


def test_a_model_that_can_not_be_audited_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "class Bare:\n    def load(self, device): print('noise')\n"
        "    def forward(self, batch): return batch\n"
    )
    found = deploy.verdict_of(Target("bare:Bare", folder=str(tmp_path)), "w")
    assert "examples()" in found["failed"]
