"""Which of the variants suit this model on this machine: how much faster, how far off, accepted or why not.

TARGET is path/to/file.py:Class (your model class, an nn.Module, or a function that gives one, with
`examples`), or the name of an application in config.yaml.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from deployments.audit.variant import verify
from deployments.core import variants
from scripts.audit import target_of

_EXAMPLES = """
examples:
  python -m scripts.variants my_model.py:Doubler                      each variant, one line
  python -m scripts.variants embed --optimise int8                    only this one
  python -m scripts.variants classify --optimise fuse,channels_last   two together
  python -m scripts.variants embed --optimise bf16 --max-error 0.01   with a bound of your own
  python -m scripts.variants embed --json                             all figures, one JSON object a line

What is accepted here may serve: put `optimise: [int8]` into the application's args.
Exit status: 0 at least one is accepted, 1 none, 2 it could not run.

variants:
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="variants",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=_EXAMPLES + "\n".join(f"  {v.name:14} {v.meaning}" for v in variants.VARIANTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", help="path/to/file.py:Class, module:Class, or an application's name")
    parser.add_argument("--optimise", metavar="NAMES", help="variants together, by commas (each by itself)")
    parser.add_argument("--max-error", type=float, help="of the mean, by the model's measure")
    parser.add_argument("--batch-size", type=int, default=32, help="of the batch that is timed (32)")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds a variant, beside loading (20)")
    parser.add_argument(
        "--config", default="config.yaml", help="where applications are looked up (config.yaml)"
    )
    parser.add_argument("--model-args", default="{}", help="the class's keyword arguments, a JSON object")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--json", action="store_true", help="print each outcome as JSON")
    options = parser.parse_args(argv)
    if not options.budget_s > 0 or options.batch_size < 1:
        parser.error("--budget-s must be above 0, --batch-size at least 1")
    try:
        target = target_of(options)
        combinations = _combinations(options)
    except (ValueError, SyntaxError) as error:
        print(f"variants: {error}", file=sys.stderr)
        return 2
    if not options.json:
        print(f"{'variant':<24} {'faster':>7} {'one':>6} {'mean error':>11} {'worst':>9}  measure    outcome")
    accepted = 0
    for names in combinations:
        try:
            outcome = verify(
                target, names, options.max_error, _progress,
                budget_s=options.budget_s, batch_size=options.batch_size,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("variants: stopped", file=sys.stderr)
            return 130
        if outcome.get("plain_failed"):
            print(f"variants: the model itself can't be run: {outcome['reason']}", file=sys.stderr)
            return 2
        accepted += outcome["accepted"]
        print(json.dumps(outcome) if options.json else _row(outcome), flush=True)
    return 0 if accepted else 1


def _combinations(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """What --optimise names, or each variant of the device. Raises ValueError."""
    if options.optimise is not None:
        return [variants.check([name.strip() for name in options.optimise.split(",")])]
    kind = options.device.partition(":")[0]
    return [(name,) for name, variant in variants.VARIANTS.items() if kind in variant.devices]


def _row(outcome: dict[str, Any]) -> str:
    name = "+".join(outcome["optimise"])
    if outcome["speedup"] is None:
        return f"{name:<24} {'-':>7} {'-':>6} {'-':>11} {'-':>9}  {'-':<10} {outcome['reason']:.160}"
    verdict = "accepted" if outcome["accepted"] else outcome["reason"].partition(": ")[2].partition(" [")[0]
    return (
        f"{name:<24} {outcome['speedup']:>6.2f}x {outcome['speedup_of_one']:>5.2f}x "
        f"{outcome['mean_error']:>11.2g} {outcome['worst_error']:>9.2g}  {outcome['measure']:<10} {verdict}"
    )


def _progress(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
