"""The verdict that a deployment goes by: the stored one, or one made now.

Owns: when an audit is made (never in a request) and that replicas of one model make it once. Must not know:
Ray, how an audit works, what a verdict is used for.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deployments.audit import store
from deployments.audit.identity import code_key
from deployments.audit.target import Target

logger = logging.getLogger(__name__)

BUDGET_S = 60.0
AUDIT_LIMIT_S = 240.0
"""Beyond its budget, for loading a large model a dozen times."""
VARIANT_LIMIT_S = 900.0
"""Compiling takes minutes."""


class VariantRefused(Exception):
    """What `optimise` asks for is not right enough, or not faster; the message has the figures."""


def check_variants(target: Target, weights: str, max_error: float | None) -> dict[str, Any]:
    """The verification of a target's variants, stored or made now. Raises VariantRefused.

    weights: of the model with its variants applied.
    """
    try:
        key = f"{code_key(target)}-variant-{max_error}"
    except (OSError, ValueError, SyntaxError) as error:
        raise VariantRefused(f"optimise: can't be verified: {error}") from error
    names = list(target.optimise)
    with contextlib.ExitStack() as stack:
        found = store.find(key, weights) or _wait_for(stack, key, weights)
        if found is None:
            logger.info("event=variant_begins model=%s optimise=%s", target.model, names)
            plain = replace(target, optimise=())
            job = {"what": "variants", "optimise": names, "max_error": max_error}
            found = {**run_apart(plain, job, VARIANT_LIMIT_S), "key": key, "weights": weights}
            if "failed" in found:
                raise VariantRefused(f"optimise: {names} could not be verified: {found['failed']}")
            _keep(found)
    if not found["accepted"]:
        raise VariantRefused(f"optimise: {found['reason']}")
    logger.info("event=variant_accepted model=%s %s", target.model, found["reason"])
    return found


def stored_verdict(target: Target, weights: str) -> dict[str, Any] | None:
    """The report that holds for this model, else one of its code with other weights; None without either."""
    try:
        key = code_key(target)
        return store.find(key, weights) or store.find(key)
    except (OSError, ValueError, SyntaxError):  # a model without source: nothing can be said of it for later
        return None


def verdict_of(target: Target, weights: str, *, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """The stored report, or a new one: about `budget_s` seconds, in processes of its own.

    Where the model can't be audited, a report with "failed": why.
    """
    try:
        key = code_key(target)
    except (OSError, ValueError, SyntaxError) as error:
        return {"failed": str(error)}
    with contextlib.ExitStack() as stack:
        known = store.find(key, weights) or _wait_for(stack, key, weights)
        if known is not None:
            return known
        began = time.monotonic()
        logger.info("event=audit_begins model=%s budget_s=%.0f", target.model, budget_s)
        report = run_apart(target, {"what": "audit", "budget_s": budget_s}, AUDIT_LIMIT_S + budget_s)
        if "failed" in report:  # not kept: what stood in its way may be gone at the next start
            logger.warning("event=audit_failed model=%s %s", target.model, report["failed"])
            return report
        report = {"weights": weights, **report, "key": key}
        _keep(report)
        logger.info(
            "event=audit_ended model=%s verdict=%r mode=%s batching=%s took_s=%.0f",
            target.model,
            report["verdict"],
            report["mode"],
            report["batching"],
            time.monotonic() - began,
        )
        return report


def run_apart(target: Target, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The report of a job of deployments/audit/__main__.py; {"failed": why} where there is none."""
    with tempfile.TemporaryDirectory(prefix="brimful-audit-") as folder:
        asked, out = Path(folder, "job.json"), Path(folder, "report.json")
        asked.write_text(json.dumps({**job, "target": asdict(target)}))
        # What the caller can import, it can: Ray puts users' folders on the path of its workers.
        path = os.pathsep.join(filter(None, (target.folder, *sys.path)))
        command = [sys.executable, "-m", "deployments.audit", str(asked), str(out)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it took longer than {limit_s:.0f} s"}
        if done.returncode or not out.exists():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            return {"failed": f"its process ended with status {done.returncode}: {last[0]}"}
        return dict(json.loads(out.read_text()))


def _wait_for(stack: contextlib.ExitStack, key: str, weights: str) -> dict[str, Any] | None:
    """Be the one who makes a report, while `stack` is open; the report, where another has just made it."""
    try:
        stack.enter_context(store.making())
    except OSError as error:
        logger.warning("event=no_store %s: XDG_CACHE_HOME should name a folder that can be written", error)
    return store.find(key, weights)


def _keep(report: dict[str, Any]) -> None:
    try:
        store.save(report)
    except OSError as error:
        logger.warning("event=verdict_not_kept %s: the next start makes it again", error)
