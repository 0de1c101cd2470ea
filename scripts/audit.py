"""May threads share one instance of this model, and may it be batched? With the proof where not.

TARGET is path/to/file.py:Class (your model class, an nn.Module, or a function that gives one, with
`examples`), or the name of an application in config.yaml.
"""

import argparse
import ast
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deployments.audit import report as reports
from deployments.audit import store
from deployments.audit.audit import OVERLAPS, Audit, AuditFailed
from deployments.audit.identity import code_key, slow_libraries
from deployments.audit.process import run_phase, start_server
from deployments.audit.target import Known, Target

_EXAMPLES = """
examples:
  python -m scripts.audit my_model.py:Doubler              may my model be shared, may it be batched?
  python -m scripts.audit embed                            an application of config.yaml
  python -m scripts.audit my_model.py:Doubler --json       the whole report, one JSON object
  python -m scripts.audit my_model.py:Doubler --markdown audit.md
  python -m scripts.audit --replay 3f9a1c22b0              a race that was found, again, step by step

Exit status: 0 as safe as tested, 1 something fails, 2 it could not run.
"""


REPLAY_S = 60.0
"""Beyond the time of the whole audit, whose trials may all have to be made again."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="audit",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", nargs="?", help="path/to/file.py:Class, module:Class, or an application's name"
    )
    parser.add_argument(
        "--config", default="config.yaml", help="where applications are looked up (config.yaml)"
    )
    parser.add_argument("--model-args", default="{}", help="the class's keyword arguments, a JSON object")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds, about (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random overlaps (0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as a page")
    parser.add_argument(
        "--store", metavar="FOLDER", type=Path, help="keep the report there (~/.cache/brimful/audits)"
    )
    parser.add_argument("--replay", metavar="ID", help="show a race again; the report names its id")
    options = parser.parse_args(argv)
    if options.replay:
        try:
            return _replay(options.replay, options.store)
        except KeyboardInterrupt:
            print("audit: stopped", file=sys.stderr)
            return 130
    if options.target is None:
        parser.error("say what to audit: path/to/file.py:Class, or an application of config.yaml")
    if not options.budget_s > 0:
        parser.error("--budget-s must be above 0")
    try:
        target = target_of(options)
        if options.device == "cpu":
            start_server(slow_libraries(target))
        key = _key(target)
        audit = Audit(target, options.target, options.budget_s, options.seed, _progress)
        report = {**audit.run(), "key": key}
    except KeyboardInterrupt:
        print("audit: stopped", file=sys.stderr)
        return 130
    except (AuditFailed, ValueError, SyntaxError) as error:
        print(f"audit: {options.target} could not be audited: {error}", file=sys.stderr)
        return 2
    _keep(report, options)
    print(json.dumps(report) if options.json else "\n".join(reports.lines(report)))
    return 1 if report["fails"] else 0


def target_of(options: argparse.Namespace) -> Target:
    """What TARGET, --config, --model-args and --device name. Raises ValueError that says what to change."""
    try:
        model_args = json.loads(options.model_args)
    except ValueError as error:
        raise ValueError(f"--model-args is not JSON: {error}") from error
    if not isinstance(model_args, dict):
        raise ValueError("--model-args must be a JSON object")
    if ":" in options.target:
        return Target(options.target, model_args, str(Path.cwd()), options.device)
    if options.target.endswith((".py", ".pt", ".pth", ".jit")):
        raise ValueError(_which(Path(options.target)))
    args = _application(options.target, Path(options.config))
    folder = str(Path(options.config).resolve().parent)
    known = {**(args.get("model_args") or {}), **model_args}
    return Target(args["model"], known, folder, options.device, tuple(args.get("optimise") or ()))


def _key(target: Target) -> str:
    try:
        return code_key(target)
    except (OSError, ValueError, SyntaxError):  # no source: kept for its replays, not as a verdict for later
        return hashlib.sha256(repr(target).encode()).hexdigest()[:32]


def _keep(report: dict[str, Any], options: argparse.Namespace) -> None:
    """What can't be written is told; the report is printed anyway."""
    try:
        store.save(report, options.store)
    except OSError as error:
        print(f"audit: the report could not be kept ({error}); --replay won't find it", file=sys.stderr)
    try:
        if options.markdown:
            Path(options.markdown).write_text(reports.markdown(report))
    except OSError as error:
        print(f"audit: --markdown: the page could not be written ({error})", file=sys.stderr)


def _which(file: Path) -> str:
    """What is missing where only a file was named."""
    if not file.exists():
        return f"there is no file {file}"
    if file.suffix != ".py":
        return (
            "weights alone have no inputs: write a file with a function that returns the module, "
            f"`def make(): return torch.jit.load({str(file)!r})`, and a function `examples()` that gives two "
            "or three inputs without a batch dimension; audit file.py:make"
        )
    found = ast.parse(file.read_text(), str(file)).body
    names = [one.name for one in found if isinstance(one, (ast.ClassDef, ast.FunctionDef))]
    return f"say which class or function of it: {file}:NAME; it has {', '.join(names[:12]) or 'none'}"


def _application(name: str, config: Path) -> dict[str, Any]:
    """The args of an application. Raises ValueError."""
    if not config.exists():
        raise ValueError(
            f"it is no path/to/file.py:Class, and there is no {config} to look it up in (--config)"
        )
    try:
        found = yaml.safe_load(config.read_text())["applications"]
        apps = {app["name"]: app.get("args") or {} for app in found}
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} is no config file: {error}") from error
    if name not in apps:
        raise ValueError(f"{config} has no application {name!r}; it has {', '.join(map(repr, apps))}")
    args = apps[name]
    if not isinstance(args, dict) or not isinstance(args.get("model"), str):
        raise ValueError(f"application {name!r} has no `model` in its args: the class as module:Class")
    if not isinstance(args.get("model_args") or {}, dict):
        raise ValueError(f"application {name!r}: model_args must be a mapping")
    optimise = args.get("optimise") or []
    if not isinstance(optimise, list) or not all(isinstance(one, str) for one in optimise):
        raise ValueError(f"application {name!r}: optimise must be a list of variants, like [int8]")
    return dict(args)


def _replay(replay: str, place: Path | None) -> int:
    found = store.find_race(replay, place)
    if found is None:
        print(f"audit: no kept report has a race {replay!r}; audit the model again", file=sys.stderr)
        return 2
    report, evidence = found
    target = Target(**report["model"])
    prefix = evidence.get("prefix")
    print(f"{report['target']}, schedule {json.dumps(evidence['trial']['schedule'])}\n", flush=True)
    outcome = run_phase(
        f"{OVERLAPS}:replay", target, Known.from_json(report["known"]), evidence["kind"], evidence["trial"],
        prefix and tuple(prefix), limit_s=REPLAY_S + report["took_s"], is_forked=target.device == "cpu",
    )  # fmt: skip
    if outcome.died:
        print(f"the process died in the overlap again: {outcome.error}")
        return 1
    if outcome.error:
        print(f"audit: {outcome.error}", file=sys.stderr)
        return 2
    print(
        "\n".join(reports.side_by_side(evidence, outcome.value, shutil.get_terminal_size((120, 0)).columns))
    )
    return 0 if outcome.value is None else 1


def _progress(line: str) -> None:
    sys.stderr.write(f"  {line}\n")  # at once: phases run side by side
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
