"""The verdict that a deployment goes by: the stored one, or one made now.

Owns: when an audit is made (never in a request) and that replicas of one model make it once. Must not know:
Ray, how an audit works, what a verdict is used for.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deployments.audit import store
from deployments.audit.audit import Audit, AuditFailed
from deployments.audit.identity import code_key
from deployments.audit.target import Target
from deployments.audit.variant import verify

logger = logging.getLogger(__name__)

BUDGET_S = 60.0


class VariantRefused(Exception):
    """What `optimise` asks for is not right enough, or not faster; the message has the figures."""


def check_variants(
    target: Target, weights: str, max_error: float | None, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The verification of a target's variants, stored or made now. Raises VariantRefused.

    weights: of the model with its variants applied.
    """
    try:
        key = f"{code_key(target)}-variant-{max_error}"
    except (OSError, ValueError, SyntaxError) as error:
        raise VariantRefused(f"optimise: can't be verified: {error}") from error
    with contextlib.ExitStack() as stack:
        found = store.find(key, weights) or _wait_for(stack, key, weights)
        if found is None:
            logger.info("event=variant_begins model=%s optimise=%s", target.model, list(target.optimise))
            plain = replace(target, optimise=())
            found = {**verify(plain, target.optimise, max_error, progress), "key": key, "weights": weights}
            _keep(found)
    said = "accepted" if found["accepted"] else "refused"
    logger.info(
        "event=variant model=%s optimise=%s %s: %s",
        target.model,
        list(target.optimise),
        said,
        found["reason"],
    )
    if not found["accepted"]:
        raise VariantRefused(f"optimise: {list(target.optimise)} is refused: {found['reason']}")
    return found


def stored_verdict(target: Target, weights: str) -> dict[str, Any] | None:
    """The report that holds for this model; None where there is none."""
    try:
        return store.find(code_key(target), weights)
    except (OSError, ValueError, SyntaxError):  # a model without source: nothing can be said of it for later
        return None


def verdict_of(
    target: Target,
    weights: str,
    *,
    budget_s: float = BUDGET_S,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
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
        try:
            report = Audit(target, target.model, budget_s, progress=progress).run()
        except AuditFailed as error:  # not kept: what stood in its way may be gone at the next start
            logger.warning("event=audit_failed model=%s %s", target.model, error)
            return {"failed": str(error)}
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
