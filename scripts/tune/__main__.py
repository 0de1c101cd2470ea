"""Measure an application and set its options: how large batches, how many slots, threads and processes.

APP is the name of an application in config.yaml, or path/to/file.py:Class for a class alone. What is measured
is the replica's own code in fresh processes, under load; no Ray, no HTTP.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.tune import config_lines
from scripts.tune.application import Application, read_application
from scripts.tune.by_rate import ByRate
from scripts.tune.crew import Crew
from scripts.tune.grid import Grid
from scripts.tune.others import Others
from scripts.tune.points import CouldNotRun
from scripts.tune.result import Result
from scripts.tune.search import Budget
from scripts.tune.session import Session, Wish
from scripts.tune.show import Progress
from scripts.tune.tuning import Tuning

_EXAMPLES = """
examples:
  python -m scripts.tune embed                                   what should embed's limits be here?
  python -m scripts.tune embed --write                           and put them into config.yaml
  python -m scripts.tune embed --objective latency --p99-ms 100  the most requests a second within 100 ms
  python -m scripts.tune embed --inputs texts.jsonl              with your own items, one JSON value a line
  python -m scripts.tune my_model.py:Doubler --json              a class that no config names yet

Exit status: 0 chosen, 1 it could not decide (the config's values stay), 2 it could not run.
"""

LEAST_START_S = 180.0
"""For loading and the first runs, whatever the budget: who isn't ready then hangs."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tune",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "application", metavar="APP", help="an application of the config, or path/to/file.py:Class"
    )
    parser.add_argument(
        "--config", type=Path, default=Path("config.yaml"), help="where it is looked up (config.yaml)"
    )
    parser.add_argument("--objective", choices=("throughput", "latency"), default="throughput")
    parser.add_argument(
        "--p99-ms", type=float, default=100.0, help="latency: what 99 %% must keep within (100)"
    )
    parser.add_argument("--budget-s", type=float, default=120.0, help="seconds, at most about (120)")
    parser.add_argument(
        "--inputs", type=Path, help="items to measure with, one JSON value a line (examples())"
    )
    parser.add_argument(
        "--grid", action="store_true", help="measure every combination instead: slow, to compare"
    )
    parser.add_argument("--no-variants", action="store_true", help="leave `optimise` as it is")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--write", action="store_true", help="put the lines into the config file")
    options = parser.parse_args(argv)
    for name in ("budget_s", "p99_ms"):
        if not 0.0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    try:
        app = read_application(options.application, options.config, options.inputs)
        if options.write and app.config is None:
            raise CouldNotRun("--write needs an application of a config file: a class alone has none")
        if options.write:
            config_lines.check_writable(options.config)
        if options.grid and options.objective == "latency":
            raise CouldNotRun("--grid measures throughput; leave --objective latency out")
    except (CouldNotRun, config_lines.CanNotWrite) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tune: stopped before anything was measured", file=sys.stderr)
        return 1
    return _tune(app, options)


def _tune(app: Application, options: argparse.Namespace) -> int:
    # Told to stop, it ends its processes too: `finally` needs an exception to unwind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    budget = Budget(options.budget_s)
    progress = Progress(options.budget_s, lambda: time.monotonic() - began)
    crew, others = Crew(app.job, max(LEAST_START_S, 2.0 * options.budget_s)), Others()
    is_by_rate = options.objective == "latency" and not app.job.is_continuous
    kind: type[Session] = Grid if options.grid else ByRate if is_by_rate else Tuning
    tuning = kind(
        app, Wish(options.objective, options.p99_ms, not options.no_variants), crew, budget, progress.say
    )
    is_whole = False
    try:
        for hint in app.hints:
            progress.say(hint)
        result = tuning.run()
        is_whole = True
    except CouldNotRun as error:
        progress.end()
        print(f"tune: {app.name} could not be measured: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        result = tuning.stopped()
    finally:
        progress.end()
        crew.close()
    result.seconds = time.monotonic() - began
    result.notes += others.notes()
    print(json.dumps(result.to_json()) if options.json else "\n".join(result.lines()))
    if options.write and is_whole and not _write(app, result, options.config):
        return 2
    return 0 if result.decided else 1


def _write(app: Application, result: Result, config: Path) -> bool:
    """True unless there is something to write that can't be."""
    if not result.changes:
        print(f"nothing to change in {config}", file=sys.stderr)
        return True
    try:
        config_lines.write(config, app.text, app.name, result.changes)
    except config_lines.CanNotWrite as error:
        print(f"tune: not written: {error}", file=sys.stderr)
        return False
    print(f"wrote {', '.join(change.key for change in result.changes)} to {config}", file=sys.stderr)
    return True


if __name__ == "__main__":
    sys.path.insert(0, "")  # the server's own rule: the model's file lies where it is started
    sys.exit(main())
