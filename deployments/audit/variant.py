"""May an optimised model serve? Only one that was shown to be right and faster, here, and audited anew.

Owns: the bounds and the words of a refusal. Must not know: torch, how answers are compared;
comparison.py does that in a fresh process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deployments.audit.process import run_phase
from deployments.audit.target import Target
from deployments.core import variants

PLAIN = "the model as it is"
"""What comparison.py says before it loads that."""
LEAST_SPEEDUP = 1.03
"""Of a batch; less is within what two runs of the same model differ by."""
WORST = 10.0
"""Times max_error that one answer may be off, where errors come in degrees."""
LOAD_S = 240.0
"""For loading both and compiling, beyond the budget."""

Progress = Callable[[str], None]


def verify(
    target: Target,
    names: Sequence[str],
    max_error: float | None = None,
    progress: Progress = lambda line: None,
    *,
    budget_s: float = 20.0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Compare `target` with and without the variants, on this machine; about `budget_s` and two loads.

    JSON: accepted, reason, failed (why it could not be compared) and plain_failed (the model itself doesn't
    load), both absent otherwise, and what was measured: measure, mean_error, worst_error, max_error, speedup
    (of a batch), speedup_of_one, audit ({"batch_invariant": {"holds", "reason", ...}, ...}).

    max_error: of the mean, on the measure's scale; None: the variants' own. Raises ValueError where the names
    are wrong.
    """
    began = time.monotonic()
    ordered = variants.check(names)
    known: dict[str, Any] = {"accepted": True, "reason": "nothing is optimised", "optimise": list(ordered)}
    if not ordered:
        return known
    progress(f"{'+'.join(ordered)}: compared with the model as it is")
    outcome = run_phase(
        "deployments.audit.comparison:compare", target, ordered, budget_s / 2, batch_size,
        limit_s=budget_s + LOAD_S, is_forked=target.device == "cpu",
        on_said=lambda said: progress(f"  {said}"),
    )  # fmt: skip
    known |= {"measure": None, "mean_error": None, "worst_error": None, "speedup": None, "audit": None}
    if outcome.error:  # perhaps not for good: "failed" is asked again at the next start
        return known | {
            "accepted": False,
            "reason": outcome.error,
            "failed": outcome.error,
            "plain_failed": outcome.last == PLAIN,
        }
    known |= outcome.value
    allowed = variants.allowed_error(ordered, known["measure"]) if max_error is None else max_error
    reason = refusal_of(known, allowed)
    if not reason:
        progress("  batches, audited as a new model's")
        known["audit"] = _batches(replace(target, optimise=ordered), budget_s / 2)
        reason = _dependence(known["audit"], target, budget_s)
    return known | {
        "max_error": allowed,
        "accepted": not reason,
        "reason": f"{'+'.join(ordered)}: {reason or _figures(known)}",
        "took_s": round(time.monotonic() - began, 1),
    }


def _figures(known: dict[str, Any]) -> str:
    mean, worst = (f"{known[name]:.2g}" for name in ("mean_error", "worst_error"))
    return f"{known['speedup']:.2f} times as fast, mean error {mean}, worst {worst} ({known['measure']})"


def refusal_of(known: dict[str, Any], allowed: float) -> str:
    """Both figures, whichever it was; "" where neither is out of bounds."""
    mean, worst, speedup = known["mean_error"], known["worst_error"], known["speedup"]
    found = []
    if not mean <= allowed:  # NaN and infinity, too
        found.append(f"mean error {mean:.2g} ({known['measure']}) is over max_error {allowed:.2g}")
    elif known["measure"] in ("cosine", "relative") and not worst <= WORST * allowed:
        found.append(f"worst error {worst:.2g} is over {WORST:.0f} times max_error {allowed:.2g}")
    if speedup < LEAST_SPEEDUP:
        found.append(f"not faster here: {speedup:.2f} times as fast")
    return f"refused: {'; '.join(found)} [{_figures(known)}]" if found else ""


def _batches(target: Target, seconds: float) -> dict[str, Any]:
    outcome = run_phase(
        "deployments.audit.phases:batches_alone", target, seconds,
        limit_s=seconds + LOAD_S, is_forked=target.device == "cpu",
    )  # fmt: skip
    if outcome.error:
        return {"batch_invariant": {"holds": None, "reason": outcome.error}}
    return {name: found.as_json() for name, found in outcome.value.items()}


def _dependence(audit: dict[str, Any], target: Target, budget_s: float) -> str:
    """Why the variant may not be batched where the model itself may."""
    found = audit["batch_invariant"]
    if found["holds"] is not False:
        return ""
    plain = _batches(replace(target, optimise=()), budget_s / 2)["batch_invariant"]
    if plain["holds"] is False:
        return ""
    return f"refused: it makes answers depend on batch-mates: {found['reason']}"
