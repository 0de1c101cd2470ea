"""What answers of fresh processes, each in another order of calls, tell of what a model keeps.

Owns: those comparisons, and what a history means for the other properties. Must not know: torch, how
processes are run.
"""

from collections.abc import Mapping
from typing import Any

from deployments.audit.findings import Property
from deployments.audit.process import Outcome


def compare_orders(outcomes: list[Outcome], alone: Mapping[str, Any]) -> Property:
    """Each call's answers, from all processes and places in the order, must be one."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        return Property(None, f"could not be decided: {errors[0]}")
    seen: dict[int, dict[str, str]] = {}
    total = 0
    for process, outcome in enumerate(outcomes):
        previous = "warm-up"
        for call, answer in outcome.value:
            total += 1
            seen.setdefault(call, {}).setdefault(answer, f"process {process + 1}, after {previous}")
            previous = " + ".join(alone["calls"][call])
    differing = {call: answers for call, answers in seen.items() if len(answers) > 1}
    if not differing:
        return Property(True, f"{total} answers in {len(outcomes)} processes, each call's all the same", [])
    call, answers = next(iter(differing.items()))
    name = " + ".join(alone["calls"][call])
    evidence = [
        {"call": alone["calls"][n], "answers": len(found), "seen": list(found.values())[:4]}
        for n, found in differing.items()
    ]
    return Property(
        False,
        f"{name} got {len(answers)} different answers, depending on what came before{where_written(alone)}",
        evidence,
    )


def is_steady(outcomes: list[Outcome]) -> bool:
    """Two processes that did the same gave the same."""
    one, other = (outcome.value if outcome.value else [] for outcome in outcomes[:2])
    return all(a == b for a, b in zip(one, other, strict=False))


def with_history(properties: Mapping[str, Property]) -> dict[str, Property]:
    """Where answers depend on earlier calls, they depend on those of other threads. A race of copies that
    needs all that came before may be a copy's own history, unless copies were seen to share one ("across").
    """
    known = dict(properties)
    history = known["order_independent"]
    if history.holds is not False:
        return known
    evidence = known["copy_safe"].evidence
    if evidence and evidence[0].get("prefix") and evidence[0].get("across") is None:
        says = "can't be told apart: a copy's answers depend on its own earlier calls"
        known["copy_safe"] = Property(None, says, evidence)
    for name in ("thread_safe", "cold_start_safe"):
        if known[name].holds is not False:
            known[name] = Property(
                False, "answers depend on earlier calls, of other threads too", history.evidence
            )
    return known


def without_steadiness(properties: Mapping[str, Property]) -> dict[str, Property]:
    """Two processes that made the same calls from the same seeds got other answers: no comparison counts."""
    why = (
        "can't be decided: the same calls in two fresh processes gave different answers (a clock, os.urandom)"
    )
    kept = ("deterministic", "eval_mode")
    known = {name: one if name in kept else Property(None, why) for name, one in properties.items()}
    if known["deterministic"].holds:
        known["deterministic"] = Property(False, why.replace("can't be decided: ", ""))
    return known


def where_written(alone: Mapping[str, Any]) -> str:
    """The first write of a call, as the end of a sentence; "" for none."""
    writes = alone["writes"] or alone["first_writes"]
    if not writes:
        return ""
    one = writes[0]
    return f"; {one['attribute']} is written at {one['file']}:{one['line']}"
