"""The `brimful` command: `serve` here, everything else in scripts/.

Owns: the names of the commands. `brimful bench x` is the same as `python -m scripts.bench x`.
"""

import argparse
import importlib.metadata
import importlib.util
import runpy
import sys

SCRIPTS = {
    "bench": "run a benchmark: the table and its JSON",
    "audit": "may this model be shared between threads, may it be batched?",
    "variants": "which optimised forms of this model are right and faster here?",
    "tune": "measure an application and set its options",
    "load": "send open-loop load to a URL",
    "batch-infer": "run a whole file through an application, offline",
    "plan": "how many replicas for this load?",
    "conformance": "run your model class through the checks that the shipped ones pass",
}

_EXAMPLES = """
examples:
  brimful serve config.yaml                   serve it on http://127.0.0.1:8000, Ctrl-C stops
  brimful serve config.yaml --port 8123       a second server on the same machine
  brimful conformance my_model:Doubler        does my model class keep the rules?

commands besides serve:
"""


def version() -> str:
    try:
        return importlib.metadata.version("brimful")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Entry point; returns the exit status (2: wrong usage)."""
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        return _script(sys.argv[1], sys.argv[2:])
    from serve_app import launcher  # after the scripts: they don't need its imports

    commands = "".join(f"  {name:<14}{does}\n" for name, does in SCRIPTS.items())
    parser = argparse.ArgumentParser(
        prog="brimful",
        description="Any PyTorch model behind HTTP on Ray Serve, the hardware full to the brim.",
        epilog=_EXAMPLES + commands,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"brimful {version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = subparsers.add_parser(
        "serve",
        help="check a config file, start Ray and Serve, drain on Ctrl-C",
        epilog="example: PORT=8123 brimful serve config.yaml",
    )
    launcher.add_arguments(serving)
    for name, does in SCRIPTS.items():
        subparsers.add_parser(name, help=does, add_help=False)
    return launcher.serve(parser.parse_args())


def _script(name: str, arguments: list[str]) -> int:
    module = "scripts." + name.replace("-", "_")
    # A folder without __main__.py is a part not written yet, like a missing file.
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    if spec is None or (is_package and importlib.util.find_spec(module + ".__main__") is None):
        print(f"brimful {name}: not in this version ({version()})", file=sys.stderr)
        return 2
    sys.argv = [f"brimful {name}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
