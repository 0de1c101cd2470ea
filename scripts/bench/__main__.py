"""`python -m scripts.bench NAME ...` (the same as `brimful bench NAME`): run benchmarks, write the table.

NAME is a benchmark, `all` of them, `peers` (the same loads on other servers) or `table`.
"""

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path

from scripts.bench.kinds_table import write_kinds
from scripts.bench.report import say
from scripts.bench.table import write_table

NAMES = (
    "embed",
    "classify",
    "noop",
    "idle",
    "latebinding",
    "fill",
    "overload",
    "poison",
    "soak",
    "giveup",
    "tokens",
    "quantised",
    "tokens8",
    "stepcpu",
    "arrivals",
    "longprompt",
    "prefix",
    "vadsocket",
    "vadengine",
    "vadws",
    "denoiser",
    "vanish",
    "unsafe",
    "pool",
    "memory",
    "tune",
    "variants",
)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def main() -> int:
    options = _parse()
    # A benchmark that is told to stop stops its server too: `with` needs an exception to unwind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.name == "table":
        return _table()
    if options.name == "peers":
        from scripts.bench.peers.run import run as run_peers

        return run_peers(options.peer, is_short=options.short, folder=_folder(options))
    names = NAMES if options.name == "all" else (options.name,)
    failed = []
    for name in names:
        say(f"{name}:")
        began = time.monotonic()
        try:
            report = importlib.import_module(f"scripts.bench.cases.{name}").run(is_short=options.short)
        except Exception as error:
            if len(names) == 1:
                raise
            say(f"  {name} failed: {error!r}")
            failed.append(name)
            continue
        out = options.out if len(names) == 1 else None
        if out is None and len(names) > 1:
            out = _folder(options) / f"{name}.json"
        say(f"  {name} took {time.monotonic() - began:.0f} s")
        report.publish(out)
    if options.name == "all" and not options.short:
        _table()
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="brimful bench", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all", "peers", "table"])
    parser.add_argument("peer", nargs="*", help="with `peers`: which (all)")
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes; proves nothing")
    parser.add_argument("--out", type=Path, help="write the JSON here (one benchmark)")
    return parser.parse_args()


def _folder(options: argparse.Namespace) -> Path:
    """Results of short runs are no results: they stay out of docs/."""
    if options.short:
        return DOCS.parents[1] / ".bench" / "short"
    return DOCS / "results"


def _table() -> int:
    path = write_table(DOCS)
    say(f"wrote docs/benchmarks/{path.name}")
    kinds = write_kinds(DOCS.parent)
    if kinds is not None:
        say(f"wrote docs/explanation/{kinds.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
