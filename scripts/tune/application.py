"""The application to tune: found in a config file (or a class in a file), with its values now.

Owns: what is read of the config, which keys tune may choose, the messages where it can't. Must not know:
torch, measuring, how the file is written.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.audit import store
from deployments.audit.identity import code_key
from deployments.audit.target import Target
from deployments.core.machine import usable_cpus
from scripts.tune.points import CouldNotRun, Job, Point, Shape
from serve_app.config import ContinuousArgs, DynamicArgs
from serve_app.config_file import MODEL_DEPLOYMENT, ConfigError, check_file
from serve_app.model_source import missing_methods, read_source

MAY_SHARE = ("shared", "pool")
LARGEST_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Application:
    """config: its file, None for a class alone. deployment: its entry, {} without. hints: what the user
    should know before measuring. mode: how the model may be used, by the config's `safety` or the stored
    audit. is_per_item: the audit says that batch-mates matter."""

    name: str
    job: Job
    start: Point
    cpus: int
    config: Path | None = None
    text: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    deployment: Mapping[str, Any] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    mode: str = "auto"
    is_per_item: bool = False

    @property
    def may_share(self) -> bool:
        """Several slots in a process."""
        return not self.job.is_continuous and self.mode in MAY_SHARE

    @property
    def may_replicate(self) -> bool:
        """More than one process: not where one alone must see all calls, and Ray scales others itself."""
        replicas = self.deployment.get("num_replicas", 1)
        return (
            not self.job.is_continuous
            and self.mode != "exclusive"
            and replicas in (None, 1)
            and not self._is_autoscaled
        )

    @property
    def _is_autoscaled(self) -> bool:
        return self.deployment.get("autoscaling_config") is not None

    @property
    def batch_key(self) -> str:
        return "max_sequences" if self.job.is_continuous else "max_batch_size"

    @property
    def cost_key(self) -> str:
        return "max_tokens_in_step" if self.job.is_continuous else "max_batch_cost"

    @property
    def unit(self) -> str:
        return "steps" if self.job.is_continuous else "items"

    def batches(self) -> list[int]:
        """Sizes to climb: doublings, and the config's own."""
        if self.is_per_item:
            return [1]
        most = min(LARGEST_BATCH, self.job.limits.max_queue_items)
        if self.job.is_continuous:
            most = min(most, self.job.limits.max_streams)
        doublings = {2**power for power in range(11) if 2**power <= most}
        return sorted(doublings | {self.start.batch})


def read_application(name: str, config: Path, inputs: Path | None = None) -> Application:
    """Raises CouldNotRun that says what to change.

    name: of an application in `config`, or path/to/file.py:Class, which needs no config.
    """
    if inputs is not None and not inputs.is_file():
        raise CouldNotRun(f"--inputs: there is no file {inputs}")
    if ":" in name:
        return _class_alone(name, inputs)
    content, folder, text = _read(config)
    entries = {str(entry.get("name", "default")): entry for entry in content["applications"]}
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
        hint = f": did you mean {close[0]!r}?" if close else f"; it has {', '.join(map(repr, entries))}"
        raise CouldNotRun(f"{config} has no application {name!r}{hint}")
    entry = entries[name]
    builder = str(entry.get("import_path", "")).replace(":", ".")
    kinds: dict[str, type[DynamicArgs] | type[ContinuousArgs]] = {
        "serve_app.builder.dynamic": DynamicArgs,
        "serve_app.builder.continuous": ContinuousArgs,
    }
    if builder not in kinds:
        raise CouldNotRun(
            f"application {name!r} is none of ours: its import_path is {entry.get('import_path')!r}"
        )
    deployments = entry.get("deployments") or []
    deployment: Mapping[str, Any] = next((d for d in deployments if d.get("name") == MODEL_DEPLOYMENT), {})
    folders = tuple(dict.fromkeys((str(folder), str(Path.cwd()))))
    return _application(
        name, kinds[builder](**entry["args"]), folders, inputs,
        config=config, text=text, args=entry["args"], deployment=deployment,
    )  # fmt: skip


def _read(config: Path) -> tuple[dict[str, Any], Path, str]:
    """(content, the folder where its modules are, its text). As `brimful serve` checks it, started here or
    in the file's own folder."""
    if not config.is_file():
        raise CouldNotRun(f"there is no {config} (--config): write an application's name and its config file")
    own = config.resolve().parent
    try:
        text = config.read_bytes().decode("utf-8")  # read_text would change \r\n
        try:
            return check_file(config).deploy, Path.cwd(), text
        except ConfigError:
            if own == Path.cwd().resolve():
                raise
            return check_file(config, own).deploy, own, text
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise CouldNotRun(str(error)) from error


def _class_alone(name: str, inputs: Path | None) -> Application:
    path, _, class_name = name.rpartition(":")
    file = Path(path)
    if file.suffix == ".py":
        if not file.is_file():
            raise CouldNotRun(f"there is no file {file}")
        folder, module = file.resolve().parent, file.stem
    else:
        folder, module = Path.cwd(), path
    try:
        steps = _is_stepwise(module, class_name, folder)
        args = (ContinuousArgs if steps else DynamicArgs)(model=f"{module}:{class_name}")
    except ModuleNotFoundError as error:
        raise CouldNotRun(f"there is no module {module!r} here") from error
    except ValueError as error:
        raise CouldNotRun(f"{name!r} is not of the form path/to/file.py:Class") from error
    return _application(class_name, args, (str(folder),), inputs, args={"model": args.model}, deployment={})


def _is_stepwise(module: str, class_name: str, folder: Path) -> bool:
    """By its source: importing it would import torch. A class with bases is taken for one with forward."""
    source = read_source(module, folder)
    if source is None:
        return False
    try:
        has_steps = not missing_methods(source, class_name, {"begin": "begin", "step": "step"})
        return has_steps and bool(missing_methods(source, class_name, {"forward": "forward"}))
    except SyntaxError as error:
        raise CouldNotRun(f"{module} has a syntax error in line {error.lineno}: {error.msg}") from error


def _application(
    name: str,
    parsed: DynamicArgs | ContinuousArgs,
    folders: tuple[str, ...],
    inputs: Path | None,
    **of_the_file: Any,
) -> Application:
    limits, cpus = parsed.limits(), usable_cpus()
    is_continuous = isinstance(parsed, ContinuousArgs)
    options = of_the_file["deployment"].get("ray_actor_options") or {}
    job = Job(
        name=name,
        model=parsed.model,
        model_args=dict(parsed.model_args),
        limits=limits,
        is_continuous=is_continuous,
        safety=parsed.safety if isinstance(parsed, DynamicArgs) else "exclusive",
        gpus=float(options.get("num_gpus", 0.0)),
        folders=folders,
        inputs=None if inputs is None else str(inputs.resolve()),
    )
    job = replace(job, report=_stored_report(job))
    mode, hints = _mode(name, job)
    is_per_item = not is_continuous and _is_per_item(job, allowed=parsed.allow_batch_dependence)
    if is_per_item:
        hints += ("the stored audit says that an answer depends on its batch-mates: items run one by one",)
    slots = limits.slots if not is_continuous and mode in MAY_SHARE else 1
    granted = float(options.get("num_cpus", 0.0))
    total = parsed.threads or (int(granted) if granted >= 1.0 else cpus)
    batch = limits.max_sequences if is_continuous else 1 if is_per_item else limits.max_batch_size
    cost = float(limits.max_tokens_in_step) if is_continuous else limits.max_batch_cost
    start = Point(Shape(slots, max(1, total // slots), parsed.optimise), batch, cost)
    return Application(name, job, start, cpus, hints=hints, mode=mode, is_per_item=is_per_item, **of_the_file)


def _stored_report(job: Job) -> Mapping[str, Any] | None:
    """Of an audit of this code; what could not be audited is as good as nothing. The server compares the
    weights, too."""
    target = Target(job.model, job.model_args, job.folders[0], "cuda" if job.gpus else "cpu")
    try:
        report = store.find(code_key(target))
    except (OSError, ValueError, SyntaxError):
        return None
    return None if report is None or "failed" in report else report


def _mode(target: str, job: Job) -> tuple[str, tuple[str, ...]]:
    """(how the model may be used, hints): as the config says, under `auto` as the stored audit says."""
    if job.is_continuous or job.safety != "auto":
        return job.safety, ()
    if job.report is not None:
        return str(job.report["mode"]), (f"safety: auto, and the stored audit says {job.report['mode']}",)
    return "auto", (
        "safety: auto without a stored verdict, so one slot in a process is all that is tried; audit first: "
        f"python -m scripts.audit {target}",
    )


def _is_per_item(job: Job, *, allowed: bool) -> bool:
    return job.report is not None and job.report["batching"] != "dynamic" and not allowed
