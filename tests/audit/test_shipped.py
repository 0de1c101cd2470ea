"""The verdicts that come with the package are those of the code that comes with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.audit import store
from deployments.audit.identity import code_key
from deployments.audit.target import Target
from deployments.runtime.adapter import Adapter, load_class
from deployments.runtime.digest import digest_of

ROOT = Path(__file__).parents[2]
APPS = {
    app["name"]: app["args"] for app in yaml.safe_load((ROOT / "config.yaml").read_text())["applications"]
}
EXPECTED = {
    "embed": ("shared", "dynamic"),
    "classify": ("shared", "dynamic"),
    "chat": ("shared", "dynamic"),
    "vad": ("shared", "dynamic"),
}


def shipped(name: str) -> dict[str, Any] | None:
    args = APPS[name]
    target = Target(
        args["model"], args.get("model_args") or {}, str(ROOT), "cpu", tuple(args.get("optimise", ()))
    )
    file = store.SHIPPED / f"{code_key(target)}.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


@pytest.mark.parametrize("name", APPS)
def test_each_shipped_models_verdict_is_stored_and_current(name: str) -> None:
    report = shipped(name)
    assert report is not None, (
        f"the code of {name!r} has changed: python -m scripts.audit {name} --store "
        "deployments/audit/shipped, and remove the old report"
    )
    assert (report["mode"], report["batching"]) == EXPECTED[name]
    assert report["properties"]["batch_invariant"]["holds"] is True
    assert report["took_s"] <= 60.0


def test_no_report_of_older_code_is_shipped() -> None:
    assert len(list(store.SHIPPED.glob("*.json"))) == len(APPS)


@pytest.mark.parametrize("name", ["embed", "classify"])
def test_the_weights_are_those_that_were_audited(name: str) -> None:
    report = shipped(name)
    assert report is not None
    adapter = Adapter(load_class(APPS[name]["model"]), {})
    adapter.load("cpu")
    assert report["weights"] in (None, digest_of(adapter.model))
