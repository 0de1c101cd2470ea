"""docs/explanation/kinds.md out of docs/benchmarks/results/audit_kinds.json: the audit of each kind.

Owns: that page. `python -m scripts.bench table` writes it; the JSON comes from tests/audit/test_kinds.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURES = {
    "order_independent": "keep nothing between calls that answers depend on",
    "thread_safe": "keep what a call needs in local variables",
    "copy_safe": "move globals, class attributes and caches to the instance",
    "batch_invariant": "reduce over an item's own dimensions, scale per row",
    "padding_invariant": "mask what is padded",
    "deterministic": "`.eval()`, or a generator made in the call",
    "eval_mode": "`.eval()` in `load`; `training=self.training`",
    "cold_start_safe": "build tables and lazy layers in `load`",
}
"""By property, the worst first: that one is shown."""

_HEAD = """# Kinds of models, and what the audit says of each

Written by `python -m scripts.bench table` from the last `pytest -m slow tests/audit/test_kinds.py`; don't
edit. Each kind is a small class in [tests/audit](../../tests/audit), with what is true of it; most unsafe
ones have a safe twin. What the words mean: [may one instance serve parallel requests?](parallel-requests.md)
"""


def write_kinds(docs: Path) -> Path | None:
    """Write explanation/kinds.md; its path, or None without a result."""
    source = docs / "benchmarks" / "results" / "audit_kinds.json"
    if not source.exists():
        return None
    path = docs / "explanation" / "kinds.md"
    path.write_text(render(json.loads(source.read_text())))
    return path


def render(result: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    figures = result["figures"]
    lines = [
        _HEAD,
        f"{figures['models']} models, `--budget-s {result['budget_s']:g}`, {figures['mean_s']:g} s each. "
        f"False properties called true: {_names(figures['false_called_true'])}. "
        f"True ones called false: {_names(figures['true_called_false'])}. "
        f"Undecided: {len(figures['undecided'])}.\n",
        "| kind | verdict | mode | batching | evidence | cure |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(result["kinds"].items()):
        worst = next((one for one in CURES if row["holds"].get(one) is False), None)
        evidence = _cell(row["reasons"][worst]) if worst else ""
        cure = CURES[worst] if worst else ""
        lines.append(
            f"| `{name}` | {row['verdict']} | {row['mode']} | {row['batching']} | {evidence} | {cure} |"
        )
    return "\n".join(lines) + "\n"


def _names(found: list[str]) -> str:
    return ", ".join(f"`{one}`" for one in found) or "none"


def _cell(text: str, width: int = 160) -> str:
    flat = text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    return flat if len(flat) <= width else flat[: width - 1] + "…"
