"""The whole audit, in its fresh processes, of every kind of model: nothing false is called true.

`pytest -m slow tests/audit/test_kinds.py` takes half an hour; its last result is in
docs/benchmarks/results/audit_kinds.json.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deployments.audit.audit import Audit
from deployments.audit.findings import PROPERTIES
from deployments.audit.target import Target
from tests.audit.kinds import TRUTH

FOLDER = Path(__file__).parents[2]
RESULT = FOLDER / "docs/benchmarks/results/audit_kinds.json"
BUDGET_S = 30.0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_false_property_is_called_true_and_at_most_two_true_ones_false() -> None:
    told: dict[str, dict[str, bool | None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    only = os.environ.get("KINDS", "").split(",") if os.environ.get("KINDS") else None
    for kind in TRUTH:
        name = kind.__name__
        if only and name not in only:
            continue
        report = Audit(Target(f"tests/audit/kinds.py:{name}", folder=str(FOLDER)), name, BUDGET_S).run()
        told[name] = {what: report["properties"][what]["holds"] for what in PROPERTIES}
        rows[name] = row_of(report)
        print(name, report["verdict"], report["mode"], report["took_s"], wrong(told, name), flush=True)
    called_true = [f"{n}.{w}" for n, w, holds in judged(told) if holds]
    called_false = [f"{n}.{w}" for n, w, holds in judged(told) if holds is False]
    undecided = [f"{n}.{w}" for n in told for w in PROPERTIES if told[n][w] is None]
    summary = {
        "benchmark": "audit_kinds",
        "figures": {
            "models": len(told),
            "false_called_true": called_true,
            "true_called_false": called_false,
            "undecided": undecided,
        },
        "budget_s": BUDGET_S,
        "kinds": rows,
    }
    if only is None:
        RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    assert called_true == []
    assert len(called_false) <= 2


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the table in docs/explanation tells of a kind."""
    found = report["properties"]
    fails = {what: found[what]["reason"] for what in PROPERTIES if found[what]["holds"] is False}
    places = {what: reason.replace(f"{FOLDER}/", "") for what, reason in fails.items()}
    keys = ("verdict", "mode", "batching", "took_s")
    return {**{key: report[key] for key in keys}, "fails": places}


def judged(told: dict[str, dict[str, bool | None]]) -> list[tuple[str, str, bool | None]]:
    """(model, property, what was said) wherever it is the opposite of the truth."""
    truth = {kind.__name__: false for kind, false in TRUTH.items()}
    return [
        (name, what, holds)
        for name, found in told.items()
        for what, holds in found.items()
        if holds is not None and holds is (what in truth[name])
    ]


def wrong(told: dict[str, dict[str, bool | None]], name: str) -> list[str]:
    return [f"{what} called {holds}" for one, what, holds in judged(told) if one == name]
