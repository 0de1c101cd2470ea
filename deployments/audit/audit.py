"""The audit of one model: its phases, two at a time, and the report that they add up to.

Owns: which phase runs when, within the budget; orders of fresh processes compared. Must not know: torch,
and how a phase decides; it runs in processes of its own.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from deployments.audit.findings import PROPERTIES, Property
from deployments.audit.process import Outcome, run_phase
from deployments.audit.target import LEAST_TRIALS, Batch, Target
from deployments.audit.verdict import batching_of, fails, mode_of, verdict_of

PHASES = "deployments.audit.phases"
ORDERS = 3
"""Fresh processes that begin with another call each."""
SHARES = {"threads": 0.25, "copies": 0.12, "cold": 0.1, "orders": 0.05, "batches": 0.1, "measured": 0.05}
"""Of the budget, for searching; a third goes into starting processes and loading the model in each."""
GRACE_S = 20.0
"""For a phase beyond its share: loading, warming up, a trial that has begun."""


class AuditFailed(Exception):
    """The audit could not run: the model doesn't load, or its examples don't go through."""


@dataclass(frozen=True, slots=True)
class Audit:
    """target: as the user named it. progress: told in a line what goes on."""

    target: Target
    name: str
    budget_s: float = 60.0
    seed: int = 0
    progress: Callable[[str], None] = field(default=lambda line: None)

    def run(self) -> dict[str, Any]:
        """The report, as JSON. Raises AuditFailed."""
        began = time.monotonic()
        first = self._phase("alone")
        if first.error:
            raise AuditFailed(first.error)
        calls: list[Batch] = first.value["batches"]
        alone = {**first.value, "calls": [[str(item) for item in batch] for batch in calls]}
        found = self._others(calls)
        properties = {
            "thread_safe": self._race(found["threads"], "threads", alone),
            "cold_start_safe": self._race(found["cold"], "cold", alone),
            "copy_safe": self._race(found["copies"], "copies", alone),
            "order_independent": compare_orders([found[f"orders {n}"] for n in range(ORDERS)], alone),
            **_batch_properties(found["batches"]),
            "deterministic": alone["deterministic"],
            "eval_mode": alone["eval_mode"],
        }
        properties = with_history(properties)
        self.progress("measured: memory and speed-ups, alone on the machine")
        costs = self._phase(
            "measured", SHARES["measured"] * self.budget_s, properties["thread_safe"].holds is True
        )
        return {
            "target": self.name,
            "verdict": verdict_of(properties, alone["writes"]),
            "batching": batching_of(properties),
            "mode": mode_of(properties),
            "fails": fails(properties),
            "properties": {name: properties[name].as_json() for name in PROPERTIES},
            "writes": alone["writes"],
            "measured": {"error": costs.error} if costs.error else costs.value,
            "versions": alone["versions"],
            "weights": alone["weights"],
            "model": {**asdict(self.target), "model_args": dict(self.target.model_args)},
            "calls": alone["calls"],
            "took_s": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def _others(self, calls: list[Batch]) -> dict[str, Outcome]:
        jobs: list[tuple[str, str, tuple[Any, ...]]] = [
            (kind, kind, (self.seed, SHARES[kind] * self.budget_s)) for kind in ("threads", "copies", "cold")
        ]
        orders_s = SHARES["orders"] * self.budget_s
        jobs[1:1] = [(f"orders {n}", "orders", (calls, n % len(calls), orders_s)) for n in range(ORDERS)]
        jobs.append(("batches", "batches", (SHARES["batches"] * self.budget_s,)))
        with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 2)))) as pool:
            running = {name: pool.submit(self._phase, phase, *arguments) for name, phase, arguments in jobs}
            return {name: job.result() for name, job in running.items()}

    def _phase(self, phase: str, *arguments: Any) -> Outcome:
        self.progress(phase)
        limit_s = self.budget_s + GRACE_S
        return run_phase(f"{PHASES}:{phase}", self.target, *arguments, limit_s=limit_s)

    def _race(self, outcome: Outcome, kind: str, alone: Mapping[str, Any]) -> Property:
        """From what a search found: a proof, nothing in so many trials, or a death that is a proof itself."""
        if outcome.died and isinstance(outcome.last, dict):
            evidence = self._evidence(kind, outcome.last, alone)
            return Property(False, f"the process died in an overlap: {outcome.error}", [evidence])
        if outcome.error:
            return Property(None, f"could not be decided: {outcome.error}")
        finding = outcome.value
        if finding is None:
            trials = outcome.last if isinstance(outcome.last, int) else 0
            if trials < LEAST_TRIALS:
                return Property(None, f"there was time for {trials} overlaps only: give more --budget-s")
            return Property(True, f"no difference in {trials} overlaps", [{"trials": trials}])
        evidence = self._evidence(kind, finding["trial"], alone) | finding
        return Property(
            False, f"thread {name_of(finding['thread'])} {finding['how']}{_at(alone)}", [evidence]
        )

    def _evidence(self, kind: str, trial: dict[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
        named = json.dumps([self.name, kind, trial], sort_keys=True)
        return {
            "replay": hashlib.sha256(named.encode()).hexdigest()[:10],
            "kind": kind,
            "trial": trial,
            "calls": {
                name_of(n): alone["calls"][call // 2 if kind == "copies" else call]
                for n, call in enumerate(trial["calls"])
            },
            "writes": (alone["writes"] or alone["first_writes"])[:6],
        }


def name_of(thread: int) -> str:
    """Threads as people call them: A, B, ..."""
    return "ABCDEFGH"[thread % 8]


def _at(alone: Mapping[str, Any]) -> str:
    writes = alone["writes"] or alone["first_writes"]
    if not writes:
        return ""
    one = writes[0]
    return f"; {one['attribute']} is written at {one['file']}:{one['line']}"


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
        f"{name} got {len(answers)} different answers, depending on what came before{_at(alone)}",
        evidence,
    )


def with_history(properties: Mapping[str, Property]) -> dict[str, Property]:
    """Where answers depend on earlier calls, they depend on those of other threads; whether on other
    instances' or on batch-mates, too, can't be told from what came before.
    """
    known = dict(properties)
    history = known["order_independent"]
    if history.holds is not False:
        return known
    for name in ("thread_safe", "cold_start_safe"):
        if known[name].holds:
            known[name] = Property(
                False, "answers depend on earlier calls, of other threads too", history.evidence
            )
    for name in ("copy_safe", "batch_invariant", "padding_invariant"):
        if known[name].holds:
            known[name] = Property(None, "can't be told apart: answers depend on earlier calls anyway")
    return known


def _batch_properties(outcome: Outcome) -> dict[str, Property]:
    if outcome.error:
        unknown = Property(None, f"could not be decided: {outcome.error}")
        return {"batch_invariant": unknown, "padding_invariant": unknown}
    return dict(outcome.value)
