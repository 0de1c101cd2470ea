"""The whole audit, in its fresh processes, of every kind of model: nothing false is called true.

`pytest -m slow tests/audit/test_kinds.py` takes half an hour on 2 cores. It may be stopped: rows of kinds are
kept in docs/benchmarks/results/audit_kinds.json; one is made anew where the kind's source changed or `KINDS`
names it (KINDS=GlobalDict,RingOfTwo).
"""

import hashlib
import inspect
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.audit.audit import OVERLAPS, Audit
from deployments.audit.findings import PROPERTIES
from deployments.audit.process import run_phase
from deployments.audit.target import Known, Target
from tests.audit import kinds, kinds_sly

FOLDER = Path(__file__).parents[2]
RESULT = FOLDER / "docs/benchmarks/results/audit_kinds.json"
BUDGET_S = 30.0
TRUTH: dict[str, tuple[Any, set[str]]] = {
    kind.__name__: (kind, false) for kind, false in {**kinds.TRUTH, **kinds_sly.TRUTH}.items()
}


def target_of(name: str) -> Target:
    file = Path(inspect.getsourcefile(TRUTH[name][0]) or "").resolve().relative_to(FOLDER)
    return Target(f"{file}:{name}", folder=str(FOLDER))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_false_property_is_called_true_and_at_most_two_true_ones_false() -> None:
    rows = json.loads(RESULT.read_text())["kinds"] if RESULT.exists() else {}
    again = os.environ.get("KINDS", "").split(",")
    for name in TRUTH:
        if name in again or rows.get(name, {}).get("source") != source_of(name):
            rows[name] = row_of(name, Audit(target_of(name), name, BUDGET_S).run())
            print(name, rows[name]["verdict"], rows[name]["took_s"], rows[name]["wrong"], flush=True)
            write({one: rows[one] for one in TRUTH if one in rows})
    rows = {one: rows[one] for one in TRUTH}
    assert wrong_in(rows, said=True) == []
    assert len(wrong_in(rows, said=False)) <= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [
        "KeysKeptOnSelf", "RingOfThree", "GlobalDict", "LazyTablePublishedTooEarly", "OwnGenerator",
        "CounterModuloN", "LruOfTwoReadBack", "LockGivenBackTooEarly", "ManualSeedInForward", "MemoryQueue",
    ],
)  # fmt: skip
def test_every_race_reported_is_shown_again_ten_times_of_ten(name: str) -> None:
    report = Audit(target_of(name), name, 10.0).run()
    races = [
        one
        for found in report["properties"].values()
        for one in found["evidence"]
        if found["holds"] is False and "replay" in one
    ]
    assert races
    known = Known.from_json(report["known"])
    for race in races:
        for _ in range(10):
            arguments = (target_of(name), known, race["kind"], race["trial"], race["prefix"])
            outcome = run_phase(f"{OVERLAPS}:replay", *arguments, limit_s=60.0)
            assert outcome.died or outcome.value is not None, race


def source_of(name: str) -> str:
    return hashlib.sha256(inspect.getsource(TRUTH[name][0]).encode()).hexdigest()[:12]


def row_of(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """What the table in docs/explanation tells of a kind."""
    found, false = report["properties"], TRUTH[name][1]
    said = {what: found[what]["holds"] for what in PROPERTIES}
    reasons = {what: found[what]["reason"] for what in PROPERTIES if not said[what]}
    return {
        **{key: report[key] for key in ("verdict", "mode", "batching", "took_s")},
        "truth": sorted(false),
        "holds": said,
        "wrong": [f"{what} called {v}" for what, v in said.items() if v is not None and v is (what in false)],
        "reasons": {what: reason.replace(f"{FOLDER}/", "") for what, reason in reasons.items()},
        "source": source_of(name),
        "git_sha": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def wrong_in(rows: dict[str, Any], *, said: bool) -> list[str]:
    return [
        f"{name}.{one}"
        for name, row in rows.items()
        for one in row["wrong"]
        if one.endswith(f"called {said}")
    ]


def write(rows: dict[str, Any]) -> None:
    null = [f"{name}.{what}" for name, row in rows.items() for what, v in row["holds"].items() if v is None]
    figures = {
        "models": len(rows),
        "false_called_true": wrong_in(rows, said=True),
        "true_called_false": wrong_in(rows, said=False),
        "undecided": [one for one in null if not one.endswith(".padding_invariant")],
        "mean_s": round(sum(row["took_s"] for row in rows.values()) / len(rows), 1),
    }
    summary = {"benchmark": "audit_kinds", "figures": figures, "budget_s": BUDGET_S, "kinds": rows}
    RESULT.write_text(json.dumps(summary, indent=1) + "\n")
