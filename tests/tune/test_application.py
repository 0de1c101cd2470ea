"""What tune takes from a config file, and from the stored audit of a model."""

from pathlib import Path
from typing import Any

import pytest

from deployments.audit import store
from deployments.audit.identity import code_key
from deployments.audit.target import Target
from scripts.tune.application import Application, read_application
from scripts.tune.changes import changes_of
from scripts.tune.points import CouldNotRun, Shape

ROOT = Path(__file__).parents[2]
CONFIG = """applications:
  - name: knee
    route_prefix: /knee
    import_path: serve_app.builder:dynamic
    args: {model: "tune_models:Knee", slots: 2, threads: 2}
    deployments: [{name: model, ray_actor_options: {num_gpus: 1}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tune_models.py").write_text((ROOT / "tests/tune/models.py").read_text())
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path) -> Application:
    return read_application("knee", folder / "config.yaml")


def audited(folder: Path, **report: Any) -> None:
    key = code_key(Target("tune_models:Knee", {}, str(folder), "cuda"))
    store.save({"key": key, "target": "knee", "properties": {}, **report})


def test_auto_without_a_verdict_tries_one_slot_and_says_how_to_get_one(folder: Path) -> None:
    app = read(folder)
    assert not app.may_share
    assert app.start.shape == Shape(1, 2)
    assert "python -m scripts.audit knee" in app.hints[0]


def test_auto_goes_by_the_stored_verdict(folder: Path) -> None:
    audited(folder, mode="pool", batching="dynamic")
    app = read(folder)
    assert app.may_share
    assert app.start.shape == Shape(2, 1)
    assert app.batches()[:3] == [1, 2, 4]


def test_a_model_whose_batch_mates_matter_is_not_batched(folder: Path) -> None:
    audited(folder, mode="processes", batching="per_item")
    app = read(folder)
    assert app.batches() == [1]
    assert app.start.batch == 1
    assert not app.may_share


def test_who_must_see_all_calls_gets_no_second_process(folder: Path) -> None:
    assert read(folder).may_replicate
    audited(folder, mode="exclusive", batching="dynamic")
    assert not read(folder).may_replicate


def test_a_choice_becomes_only_the_keys_that_differ(folder: Path) -> None:
    audited(folder, mode="shared", batching="dynamic")
    app = read(folder)
    assert changes_of(app, app.start, {}) == []
    two = app.start.with_shape(Shape(1, 2, replicas=2)).with_batch(64)
    found = {change.key: (change.value, change.was) for change in changes_of(app, two, {"batch": "why"})}
    assert found == {
        "max_batch_size": (64, None),
        "slots": (1, 2),
        "num_replicas": (2, None),
        "ray_actor_options.num_gpus": (0.5, 1),
    }


def test_a_class_alone_is_stepped_where_it_has_steps(folder: Path) -> None:
    assert read_application("tune_models.py:Stepper", Path("none")).job.is_continuous
    assert not read_application("tune_models.py:Knee", Path("none")).job.is_continuous
    with pytest.raises(CouldNotRun, match="no module 'nowhere'"):
        read_application("nowhere:Knee", Path("none"))
