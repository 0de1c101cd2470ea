"""What the terminal says of the models' safety: that one is audited first, and the verdict once it serves.

Owns: these lines. Must not know: how an audit works. Source of the verdict: the replica's own /stats.
"""

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.audit import store
from deployments.audit.identity import code_key
from deployments.audit.target import Target

_WIDTH = 150


def is_audited_first(entry: Mapping[str, Any], folder: Path) -> bool:
    """Whether an application of the config file will wait for its model's first audit.

    entry: one of `applications`. folder: where users' modules lie.
    """
    args = entry.get("args") or {}
    if not str(entry.get("import_path", "")).endswith(":dynamic") or args.get("safety", "auto") != "auto":
        return False
    optimise = tuple(args.get("optimise", ()))
    target = Target(args["model"], args.get("model_args") or {}, str(folder), _device(entry), optimise)
    try:
        return store.find(code_key(target)) is None
    except (OSError, ValueError, SyntaxError):  # it has no source to audit; the replica's log says so
        return False


def _device(entry: Mapping[str, Any]) -> str:
    options = [d.get("ray_actor_options") or {} for d in entry.get("deployments") or ()]
    return "cuda" if any(option.get("num_gpus") for option in options) else "cpu"


def verdict_lines(url: str) -> list[str]:
    """Of the application at `url`: its verdict and how it is used, what evidence speaks against that, what
    its variants gain; none where it doesn't say."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/stats", timeout=5) as answer:
            stats = json.load(answer)
    except (OSError, ValueError):
        return []
    safety = stats.get("safety") or {}
    found = [_verdict(stats, safety)] if safety.get("verdict") else []
    if safety.get("warning"):
        found.append(f"WARNING: {safety['warning']}")
    if safety.get("variants"):
        found.append(f"optimised: {safety['variants']}")
    return [line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…" for line in found]


def _verdict(stats: Mapping[str, Any], safety: Mapping[str, Any]) -> str:
    slots = stats.get("slots", {}).get("total", 1)
    uses = {
        "shared": f"one instance, {slots} thread{'s' * (slots > 1)}",
        "pool": f"a pool of up to {slots} instance{'s' * (slots > 1)}",
        "processes": "one call at a time; more replicas for more",
        "exclusive": "one call at a time",
    }
    if "max_batch_size" not in stats["limits"]:  # a continuous application
        return f"{safety['verdict']}: all steps on one thread"
    batches = "" if stats["limits"].get("max_batch_size", 2) > 1 else ", items one by one"
    text = f"{safety['verdict']}: {uses.get(safety['mode'], safety['mode'])}{batches}"
    if safety["verdict"] not in ("safe as tested", "writes, no effect found"):
        text += f" ({safety['reason']})"
    return text
