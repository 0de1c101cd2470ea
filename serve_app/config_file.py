"""Checks a whole Ray Serve config file before anything starts, and says all that is wrong with it.

Ray ignores keys that it doesn't know (`num_replica: 4` gives one replica). Owns: which keys may
stand where, and the messages. The key sets are literal, for importing Ray costs 2 s; a test compares
them with Ray's schemas. Values of Ray's own keys are checked by Ray, in the server process, before
it starts anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.core.contract import Limits
from serve_app.config import (
    ContinuousArgs,
    ContinuousUserConfig,
    DynamicArgs,
    ModelArgs,
    ModelUserConfig,
    nearest,
    problems_of,
)
from serve_app.model_source import missing_methods, read_source, top_names


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_KEYS = _words(
    "proxy_location http_options grpc_options logging_config tracing_config controller_options"
    " applications target_capacity"
)
HTTP_KEYS = _words(
    "host port root_path request_timeout_s keep_alive_timeout_s ssl_keyfile ssl_certfile"
    " ssl_keyfile_password ssl_ca_certs"
)
GRPC_KEYS = _words("port grpc_servicer_functions request_timeout_s enable_reflection")
LOGGING_KEYS = _words("encoding log_level logs_dir enable_access_log additional_log_standard_attrs")
CONTROLLER_KEYS = frozenset({"runtime_env"})
APPLICATION_KEYS = _words(
    "name route_prefix import_path runtime_env host port deployments args logging_config"
    " autoscaling_policy external_scaler_enabled"
)
DEPLOYMENT_KEYS = _words(
    "name num_replicas max_ongoing_requests max_queued_requests user_config autoscaling_config"
    " graceful_shutdown_wait_loop_s graceful_shutdown_timeout_s health_check_period_s"
    " health_check_timeout_s ray_actor_options placement_group_bundles placement_group_strategy"
    " placement_group_bundle_label_selector max_replicas_per_node logging_config"
    " request_router_config max_surge_percent rolling_update_percentage backpressure_config"
    " gang_scheduling_config deployment_actors"
)
ACTOR_KEYS = _words(
    "num_cpus num_gpus memory resources accelerator_type runtime_env label_selector fallback_strategy"
)
AUTOSCALING_KEYS = _words(
    "min_replicas initial_replicas max_replicas target_ongoing_requests metrics_interval_s"
    " look_back_period_s smoothing_factor upscale_smoothing_factor downscale_smoothing_factor"
    " upscaling_factor downscaling_factor downscale_delay_s downscale_to_zero_delay_s"
    " upscale_delay_s aggregation_function policy"
)
OUR_BUILDERS = "serve_app.builder"
LATER_BUILDERS = frozenset({"console"})
MODEL_DEPLOYMENT = "model"


@dataclass(frozen=True, slots=True)
class Builder:
    """What the args and the user_config of a builder's applications are checked with.

    required: methods of its model class, name to signature.
    """

    args: type[ModelArgs]
    user_config: type[ModelUserConfig] | type[ContinuousUserConfig]
    required: Mapping[str, str]


BUILDERS = {
    "dynamic": Builder(
        DynamicArgs,
        ModelUserConfig,
        {"load": "load(self, device)", "forward": "forward(self, batch)"},
    ),
    "continuous": Builder(
        ContinuousArgs,
        ContinuousUserConfig,
        {"load": "load(self, device)"},  # beside it: begin and step, or a language model's own
    ),
}


class ConfigError(Exception):
    """The file can't be served; the message lists every problem, one a line."""


@dataclass(frozen=True, slots=True)
class CheckedApp:
    name: str
    prefix: str
    is_ours: bool
    model: str | None  # "module:Class" where is_ours


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """`deploy` is the file's content for Ray's ServeDeploySchema, unchanged."""

    deploy: dict[str, Any]
    apps: tuple[CheckedApp, ...]

    @property
    def host(self) -> str | None:
        host = (self.deploy.get("http_options") or {}).get("host")
        return None if host is None else str(host)

    @property
    def port(self) -> int | None:
        port = (self.deploy.get("http_options") or {}).get("port")
        return None if port is None else int(port)


def check_file(path: Path, start_folder: Path | None = None) -> CheckedConfig:
    """Parse and check everything. Raises ConfigError with all problems found.

    `start_folder` (the current one) is where users' own modules are found.
    """
    folder = (start_folder or Path.cwd()).resolve()
    content = _parse(path)
    check = _Check(folder)
    check.shadows()
    apps = check.file(content)
    if check.problems:
        head = f"{path} can't be served, nothing was started:"
        raise ConfigError("\n  ".join([head, *dict.fromkeys(check.problems)]))
    return CheckedConfig(content, apps)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win, silently; here the second is an error."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, (str, int, float, bool, type(None))):
            if key in seen:
                raise ConfigError(f"line {line}: key {key!r} stands twice (first in line {seen[key]})")
            seen[key] = line
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"can't read {path}: {reason}") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys at the top, found {type(content).__name__}")
    return content


class _Check:
    """Walks the file and collects problems; `where` is the path of words to the value."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        # Of the application being checked: its builder where it is ours, its limits where args are right.
        self.builder: Builder | None = None
        self.limits: Limits | None = None

    def note(self, where: str, text: str) -> None:
        self.problems.append(f"{where}: {text}" if where else text)

    def keys(self, value: Any, known: frozenset[str], where: str) -> dict[str, Any]:
        """The mapping with unknown keys noted; {} where it is none."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.note(where, f"expected keys and values, got {value!r:.80}")
            return {}
        for key in value:
            if key not in known:
                self.note(
                    where,
                    f"unknown key {key!r} (value {value[key]!r:.60}){nearest(str(key), known)}",
                )
        return dict(value)

    def shadows(self) -> None:
        """A start folder's own deployments or serve_app would be imported instead of ours."""
        ours = Path(__file__).resolve().parent.parent
        for name in ("deployments", "serve_app"):
            spec = PathFinder.find_spec(name, [str(self.folder)])
            places = [Path(p).resolve() for p in (spec and spec.submodule_search_locations) or []]
            if spec is not None and places != [ours / name]:
                at = spec.origin or places[0]
                self.note("", f"the start folder's {at} would shadow brimful's own {name!r}: rename it")

    def file(self, content: dict[str, Any]) -> tuple[CheckedApp, ...]:
        top = self.keys(content, TOP_KEYS, "top level")
        http = self.keys(top.get("http_options"), HTTP_KEYS, "http_options")
        self.http_values(http)
        self.keys(top.get("grpc_options"), GRPC_KEYS, "grpc_options")
        self.keys(top.get("logging_config"), LOGGING_KEYS, "logging_config")
        self.keys(top.get("controller_options"), CONTROLLER_KEYS, "controller_options")
        entries = top.get("applications")
        if not isinstance(entries, list) or not entries:
            self.note("applications", "expected a list with at least one application")
            return ()
        apps = tuple(self.application(entry, index) for index, entry in enumerate(entries))
        self.unique([app.name for app in apps], "name")
        self.unique([app.prefix for app in apps if app.prefix], "route_prefix")
        return apps

    def http_values(self, http: dict[str, Any]) -> None:
        port = http.get("port")
        if port is not None and not (_is_int(port) and 0 < port < 65_536):
            self.note("http_options", f"port: expected a number from 1 to 65535, got {port!r}")
        if http.get("host") is not None and not isinstance(http["host"], str):
            self.note("http_options", f"host: expected an address, got {http['host']!r}")

    def unique(self, values: list[str], key: str) -> None:
        for value in sorted({v for v in values if values.count(v) > 1}):
            self.note("applications", f"{key} {value!r} stands {values.count(value)} times")

    def application(self, entry: Any, index: int) -> CheckedApp:
        name = entry.get("name", "default") if isinstance(entry, Mapping) else None
        where = f"application {name!r}" if isinstance(name, str) else f"applications[{index}]"
        app = self.keys(entry, APPLICATION_KEYS, where)
        if not isinstance(app.get("name", "default"), str) or app.get("name", "default") == "":
            self.note(where, f"name: expected a word, got {app.get('name')!r}")
        prefix = self.prefix(app, where)
        import_path = app.get("import_path")
        if not isinstance(import_path, str) or not _splits(import_path):
            self.note(where, f"import_path: expected 'module:name', got {import_path!r}")
            import_path = ""
        module, _, attribute = import_path.replace(":", ".").rpartition(".")
        is_ours = module == OUR_BUILDERS
        model = None
        self.limits, self.builder = None, None
        if is_ours:
            model = self.ours(app, attribute, where)
        self.keys(app.get("logging_config"), LOGGING_KEYS, f"{where}, logging_config")
        self.deployments(app.get("deployments"), where, is_ours=is_ours)
        return CheckedApp(str(name), prefix, is_ours, model)

    def prefix(self, app: dict[str, Any], where: str) -> str:
        prefix = app.get("route_prefix", "/")
        if prefix is None:  # Ray: not reachable over HTTP
            return ""
        if not isinstance(prefix, str) or not prefix.startswith("/"):
            self.note(where, f"route_prefix: must begin with '/', got {prefix!r}")
            return ""
        if prefix != "/" and prefix.endswith("/"):
            self.note(where, f"route_prefix: must not end with '/': write {prefix.rstrip('/')!r}")
        if "{" in prefix or " " in prefix:
            self.note(where, f"route_prefix: no spaces or braces, got {prefix!r}")
        return prefix

    def ours(self, app: dict[str, Any], builder: str, where: str) -> str | None:
        """Check `args` of an application of ours; returns its model where that is well-formed."""
        if builder in LATER_BUILDERS:
            self.note(where, f"import_path: {OUR_BUILDERS}:{builder} is not in this version")
            return None
        if builder not in BUILDERS:
            self.note(where, f"import_path: no builder {builder!r}{nearest(builder, BUILDERS)}")
            return None
        self.builder = BUILDERS[builder]
        args = app.get("args", {})
        where = f"{where}, args"
        if not isinstance(args, Mapping):
            self.note(where, f"expected keys and values, got {args!r:.80}")
            return None
        model = args.get("model")
        wrong: list[tuple[str, str]] = []
        try:
            self.limits = self.builder.args.model_validate(dict(args)).limits()
        except ValidationError as error:
            wrong = problems_of(error)
        for key, message in wrong:
            if message.startswith("unknown key"):
                self.note(where, f"{message} (value {args.get(key)!r:.60})")
            else:
                self.note(where, f"{key}: {message}" if key else message)
        if not isinstance(model, str) or "model" in dict(wrong):
            return None
        self.find_model(model, f"{where}, model")
        return model

    def find_model(self, model: str, where: str) -> None:
        """The module must be found and, as far as its source tells, have the class."""
        module, _, name = model.partition(":")
        try:
            source = read_source(module, self.folder)
        except ModuleNotFoundError as error:
            missing = error.name or module
            self.note(where, f"no module {missing!r} for {model!r} here or among what is installed")
            return
        except Exception as error:  # a user's own package may raise anything on import
            self.note(where, f"importing the package of {model!r} failed: {error!r:.200}")
            return
        if source is None:
            return
        try:
            names, is_complete = top_names(source)
        except SyntaxError as error:
            self.note(where, f"{module} has a syntax error in line {error.lineno}: {error.msg}")
            return
        if is_complete and name not in names:
            self.note(where, f"module {module!r} has no class {name!r}{nearest(name, names)}")
        required = self.builder.required if self.builder else {}
        for method in missing_methods(source, name, required):
            self.note(where, f"class {name} has no {method}; add `def {method}`")

    def deployments(self, value: Any, where: str, *, is_ours: bool) -> None:
        if value is None:
            return
        if not isinstance(value, list):
            self.note(f"{where}, deployments", f"expected a list, got {value!r:.80}")
            return
        for index, entry in enumerate(value):
            name = entry.get("name") if isinstance(entry, Mapping) else None
            at = f"{where}, deployment {name!r}" if name else f"{where}, deployments[{index}]"
            deployment = self.keys(entry, DEPLOYMENT_KEYS, at)
            if not isinstance(name, str):
                self.note(at, "name is missing")
            options = deployment.get("ray_actor_options")
            self.actor_values(self.keys(options, ACTOR_KEYS, f"{at}, ray_actor_options"), at)
            autoscaling = deployment.get("autoscaling_config")
            self.keys(autoscaling, AUTOSCALING_KEYS, f"{at}, autoscaling_config")
            replicas = deployment.get("num_replicas")
            if replicas not in (None, "auto") and not (_is_int(replicas) and replicas >= 1):
                self.note(at, f"num_replicas: expected 'auto' or a number from 1, got {replicas!r}")
            if is_ours:
                self.our_deployment(deployment, at)

    def actor_values(self, options: dict[str, Any], where: str) -> None:
        for key in ("num_cpus", "num_gpus", "memory"):
            value = options.get(key)
            if value is not None and not (_is_number(value) and value >= 0):
                self.note(f"{where}, ray_actor_options", f"{key}: expected a number from 0, got {value!r}")

    def our_deployment(self, deployment: dict[str, Any], where: str) -> None:
        name = deployment.get("name")
        if isinstance(name, str) and name != MODEL_DEPLOYMENT:
            self.note(where, f"name: the deployment of an application of ours is 'model', not {name!r}")
        for key, reason in (
            ("max_ongoing_requests", "it is set above the queue's own bound, so that the batcher fills"),
            ("max_queued_requests", "the batcher's queue has the bounds max_queue_items and _cost"),
        ):
            if key in deployment:
                self.note(where, f"{key}: can't be overridden (got {deployment[key]!r}): {reason}")
        user_config = deployment.get("user_config")
        if user_config is None or self.builder is None:
            return
        try:
            changes = self.builder.user_config.model_validate(user_config)
            if self.limits is not None:
                changes.apply(self.limits)
        except ValidationError as error:
            for key, message in problems_of(error):
                text = message if message.startswith("unknown key") or not key else f"{key}: {message}"
                self.note(f"{where}, user_config", text)
        except ValueError as error:  # each is right, but not beside `args`
            self.note(f"{where}, user_config", str(error))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _splits(import_path: str) -> bool:
    """Ray takes "module:name" and "module.name"."""
    head, _, tail = import_path.replace(":", ".").rpartition(".")
    return bool(head) and bool(tail) and import_path.count(":") <= 1
