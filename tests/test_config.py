"""The config file's check: every slip is named with its application, its key and the nearest right one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.core.contract import Limits
from serve_app import config_file, environment
from serve_app.config import (
    HEADROOM,
    ContinuousArgs,
    ContinuousUserConfig,
    DynamicArgs,
    ModelUserConfig,
    let_in,
)
from serve_app.config_file import ConfigError, check_file

ROOT = Path(__file__).parent.parent

MODEL = "class Doubler:\n    def load(self, device): ...\n    def forward(self, batch): ...\n"


def embed() -> dict[str, Any]:
    return {
        "name": "embed",
        "route_prefix": "/embed",
        "import_path": "serve_app.builder:dynamic",
        "args": {"model": "my_model:Doubler"},
        "deployments": [{"name": "model"}],
    }


def problems(tmp_path: Path, content: Any) -> str:
    """The message with which the file is refused."""
    (tmp_path / "my_model.py").write_text(MODEL)
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        check_file(path, tmp_path)
    return str(caught.value)


def file_with(**changes: Any) -> dict[str, Any]:
    return {"applications": [{**embed(), **changes}]}


def with_args(**args: Any) -> dict[str, Any]:
    return file_with(args={"model": "my_model:Doubler", **args})


def with_deployment(**options: Any) -> dict[str, Any]:
    return file_with(deployments=[{"name": "model", **options}])


def test_the_shipped_file_is_right() -> None:
    checked = check_file(ROOT / "config.yaml", ROOT)
    assert [app.prefix for app in checked.apps] == ["/embed", "/classify", "/chat", "/vad"]
    assert checked.host == "127.0.0.1"


def test_a_users_own_model_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text("raise SystemExit('never run by the check')\n" + MODEL)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"applications": [embed()]}))
    (app,) = check_file(tmp_path / "c.yaml", tmp_path).apps
    assert (app.name, app.model, app.is_ours) == ("embed", "my_model:Doubler", True)


def test_any_other_ray_application_passes_through(tmp_path: Path) -> None:
    entry = {"name": "x", "route_prefix": "/x", "import_path": "a.b:app", "args": {"any": 1}}
    entry["deployments"] = [{"name": "Whatever", "max_ongoing_requests": 3, "user_config": {"a": 1}}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"applications": [entry]}))
    (app,) = check_file(tmp_path / "c.yaml", tmp_path).apps
    assert not app.is_ours


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"aplications": []}, ["top level", "'aplications'", "did you mean 'applications'?"]),
        (file_with(nam="x"), ["application 'embed'", "did you mean 'name'?"]),
        (file_with(route_prefx="/x"), ["did you mean 'route_prefix'?"]),
        (with_deployment(num_replica=4), ["'embed'", "'model'", "value 4", "'num_replicas'?"]),
        (with_deployment(ray_actor_options={"num_gpu": 1}), ["did you mean 'num_gpus'?"]),
        (with_deployment(ray_actor_options={"num_gpus": "1"}), ["num_gpus", "got '1'"]),
        (with_deployment(ray_actor_options={"num_cpus": -1}), ["num_cpus", "-1"]),
        (with_deployment(autoscaling_config={"max_replica": 2}), ["'max_replicas'?"]),
        (with_deployment(num_replicas=0), ["num_replicas", "got 0"]),
        (with_deployment(num_replicas=True), ["num_replicas", "got True"]),
        (with_deployment(num_replicas="two"), ["num_replicas", "'two'"]),
        (with_deployment(max_ongoing_requests=5), ["max_ongoing_requests", "can't be overridden"]),
        (with_deployment(max_queued_requests=5), ["max_queued_requests", "can't be overridden"]),
        (with_deployment(user_config={"max_batchsize": 1}), ["'max_batch_size'?"]),
        (with_deployment(user_config={"slots": 2}), ["user_config", "'slots'"]),
        (with_deployment(user_config={"draining": 1}), ["draining"]),
        (file_with(deployments=[{"name": "Model"}]), ["'model'", "'Model'"]),
        (file_with(deployments={"name": "model"}), ["expected a list"]),
        (file_with(route_prefix="embed"), ["route_prefix", "must begin with '/'"]),
        (file_with(route_prefix="/embed/"), ["must not end with '/'", "'/embed'"]),
        (file_with(import_path="serve_app.builder:dynamc"), ["did you mean 'dynamic'?"]),
        (file_with(import_path="serve_app.builder:console"), ["not in this version"]),
        (file_with(import_path="nothing"), ["import_path", "'module:name'"]),
        (file_with(args=[]), ["args", "expected keys"]),
        (with_args(max_batchsize=8), ["args", "value 8", "did you mean 'max_batch_size'?"]),
        (with_args(max_batch_size=0), ["args", "max_batch_size", "got 0"]),
        (with_args(max_batch_size=True), ["max_batch_size", "got True"]),
        (with_args(max_batch_size="32"), ["max_batch_size", "got '32'"]),
        (with_args(max_batch_size=1.5), ["max_batch_size", "got 1.5"]),
        (with_args(batch_wait_ms=-1), ["batch_wait_ms", "-1"]),
        (with_args(timeout_ms=float("inf")), ["timeout_ms", "inf"]),
        (with_args(timeout_ms=float("nan")), ["timeout_ms", "nan"]),
        (with_args(max_queue_s="automatic"), ["max_queue_s", "'automatic'"]),
        (with_args(safety="safe"), ["safety", "'shared'", "got 'safe'"]),
        (with_args(max_items_per_request=9, max_queue_items=8), ["max_items_per_request"]),
        (with_args(safety="exclusive", slots=2), ["slots", "set slots: 1", "num_replicas: 2"]),
        (with_args(safety="processes", slots=3), ["slots", "safety=processes", "safety: pool"]),
        (with_args(memory=0), ["memory", "got 0"]),
        (with_args(memory=1.5), ["memory", "got 1.5"]),
        (with_args(memory="1 GiB"), ["memory", "a share above 0 and up to 1", "'1 GiB'"]),
        (with_args(memory=float("inf")), ["memory", "got inf"]),
        (with_args(memory=2), ["memory", "bytes as a whole number from 1048576"]),
        (with_args(optimise="int8"), ["optimise", "a list of variants"]),
        (with_args(optimise=["int9"]), ["optimise", "did you mean 'int8'?"]),
        (with_args(optimise=["int8", "bf16"]), ["optimise", "exclude each other"]),
        (with_args(max_error=2), ["max_error", "got 2"]),
        (with_args(allow_batch_dependence="yes"), ["allow_batch_dependence", "'yes'"]),
        (with_deployment(user_config={"memory": -1}), ["memory", "-1"]),
        (with_args(max_queue_cost=9, max_batch_cost=10), ["max_queue_cost=9", "max_batch_cost=10"]),
        (with_deployment(user_config={"max_queue_items": 2000}), ["max_queue_items: 2000", "at most 1536"]),
        (with_args(model="Doubler"), ["model", "module:Class"]),
        (with_args(model="my_modle:Doubler"), ["no module 'my_modle'"]),
        (with_args(model="my_model:Dubler"), ["no class 'Dubler'", "did you mean 'Doubler'?"]),
        (with_args(model_args=[1]), ["model_args"]),
        (file_with(args={}), ["args", "model", "Field required"]),
        ({**file_with(), "http_options": {"hots": "x"}}, ["http_options", "did you mean 'host'?"]),
        ({**file_with(), "http_options": {"port": "8000"}}, ["http_options", "port", "'8000'"]),
        ({**file_with(), "logging_config": {"level": 1}}, ["logging_config", "'log_level'?"]),
        ({"applications": [embed(), embed()]}, ["name 'embed' stands 2 times", "route_prefix"]),
        ({"applications": []}, ["applications", "at least one"]),
        ({"applications": ["x"]}, ["applications[0]", "expected keys"]),
        ("applications: [", ["not YAML"]),
        ("just text", ["expected keys at the top"]),
        ("a: 1\napplications: []\na: 2\n", ["line 3", "'a' stands twice", "line 1"]),
    ],
)  # fmt: skip
def test_slips_are_named(tmp_path: Path, content: Any, expected: list[str]) -> None:
    message = problems(tmp_path, content)
    assert "config.yaml" in message
    for part in expected:
        assert part in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    content = with_args(max_batchsize=8, slots=0, max_queue_s=-1)
    content["applications"][0]["deployments"] = [{"name": "model", "num_replica": 4}]
    content["http_options"] = {"prt": 1}
    message = problems(tmp_path, content)
    assert len(message.splitlines()) == 6


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file"):
        check_file(tmp_path / "no.yaml", tmp_path)


@pytest.mark.parametrize("name", ["deployments", "serve_app"])
def test_a_start_folder_that_would_shadow_us_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    assert f"would shadow brimful's own {name!r}" in problems(tmp_path, file_with())


def test_a_plain_ray_start_names_the_key_too() -> None:
    """Ray shows pydantic's own message when the builder refuses its arguments."""
    with pytest.raises(ValidationError) as caught:
        DynamicArgs.model_validate({"model": "a:B", "max_batchsize": 8, "slots": 0})
    assert "did you mean 'max_batch_size'?" in str(caught.value)
    assert "slots" in str(caught.value)


def test_limits_are_those_of_the_core_by_default() -> None:
    assert DynamicArgs(model="a:B").limits() == Limits()


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 5000])
def test_threads_are_a_whole_number_from_1(threads: Any) -> None:
    assert DynamicArgs(model="m:C", threads=3).threads == 3
    with pytest.raises(ValidationError, match="threads"):
        ContinuousArgs(model="m:C", threads=threads)


def test_a_small_queue_takes_shorter_lists_unasked() -> None:
    assert DynamicArgs(model="a:B", max_queue_items=8).limits().max_items_per_request == 8
    changed = ModelUserConfig(max_queue_items=8).apply(Limits())
    assert (changed.max_queue_items, changed.max_items_per_request) == (8, 8)


def test_user_config_changes_only_what_it_names() -> None:
    changed = ModelUserConfig(max_queue_s=2.0, draining=True).apply(Limits())
    assert changed == Limits(max_queue_s=2.0)
    assert ModelUserConfig(max_queue_s="auto").apply(changed) == Limits()


@pytest.mark.parametrize("safety", ["exclusive", "processes"])
def test_one_slot_is_what_an_exclusive_model_may_have(safety: Any) -> None:
    assert DynamicArgs(model="a:B", safety=safety).limits().slots == 1
    assert DynamicArgs(model="a:B", safety="pool", slots=2).limits().slots == 2


def test_a_queue_holds_at_least_a_batch() -> None:
    assert DynamicArgs(model="a:B", max_queue_cost=10.0, max_batch_cost=10.0).limits().max_queue_cost == 10
    with pytest.raises(ValueError, match="max_batch_cost: a queue of"):
        ModelUserConfig(max_batch_cost=11.0).apply(Limits(max_queue_cost=10.0))


def test_user_config_takes_no_more_than_ray_lets_in() -> None:
    base = Limits(max_queue_items=1000, slots=2, max_batch_size=32)
    assert let_in(base) == 1000 + 64 + HEADROOM
    assert ModelUserConfig(max_queue_items=1000 + HEADROOM).apply(base).max_queue_items == 1512
    for change in ({"max_queue_items": 1001 + HEADROOM}, {"max_queue_items": 1500, "max_batch_size": 64}):
        with pytest.raises(ValueError, match=r"max_queue_items: .* or raise max_queue_items in `args`"):
            ModelUserConfig(**change).apply(base)


def test_key_sets_are_those_of_this_version_of_ray() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at import
        from ray.serve import schema
        from ray.serve.config import AutoscalingConfig, ControllerOptions
    for ours, theirs in (
        (config_file.TOP_KEYS, schema.ServeDeploySchema),
        (config_file.HTTP_KEYS, schema.HTTPOptionsSchema),
        (config_file.GRPC_KEYS, schema.gRPCOptionsSchema),
        (config_file.LOGGING_KEYS, schema.LoggingConfig),
        (config_file.CONTROLLER_KEYS, ControllerOptions),
        (config_file.APPLICATION_KEYS, schema.ServeApplicationSchema),
        (config_file.DEPLOYMENT_KEYS, schema.DeploymentSchema),
        (config_file.ACTOR_KEYS, schema.RayActorOptionsSchema),
        (config_file.AUTOSCALING_KEYS, AutoscalingConfig),
    ):
        assert ours == set(theirs.model_fields), theirs.__name__


def test_serve_env_is_plain_and_the_environment_wins() -> None:
    environ = {"RAY_SERVE_HAPROXY_NBTHREAD": "7"}
    assert environment.load(ROOT / "config.yaml", environ) == ROOT / "serve.env"
    assert environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "7"
    assert environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environ["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("haproxy-brimful")
    assert environ["RAY_SERVE_HAPROXY_RETRY_ON"] == "conn-failure empty-response junk-response"


def test_serve_env_beside_the_config_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "serve.env").write_text("# mine\nexport A='x y' \nB=2 # two\n")
    environ: dict[str, str] = {}
    environment.load(tmp_path / "config.yaml", environ)
    assert (environ["A"], environ["B"]) == ("x y", "2")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environ


def test_a_line_that_is_no_assignment_is_named() -> None:
    with pytest.raises(environment.EnvFileError, match="line 2: expected KEY=VALUE"):
        environment.parse("A=1\nB 2\n")


def test_a_model_class_without_forward_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("class Half:\n    def load(self, device):\n        pass\n")
    file = tmp_path / "config.yaml"
    file.write_text(
        "applications:\n"
        "  - {name: half, route_prefix: /half, import_path: 'serve_app.builder:dynamic',"
        " args: {model: 'half:Half'}}\n"
    )
    with pytest.raises(ConfigError, match=r"Half has no forward\(self, batch\)"):
        check_file(file, tmp_path)


def test_a_continuous_applications_memory_is_made_at_start_and_not_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="unknown key 'memory'"):
        ContinuousUserConfig(memory=0.5)  # type: ignore[call-arg]
