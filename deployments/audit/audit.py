"""The audit of one model: its phases, two at a time, and the report that they add up to.

Owns: which phase runs when, within the budget; orders of fresh processes compared. Must not know: torch,
and how a phase decides; it runs in processes of its own.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from deployments.audit.findings import PROPERTIES, Property
from deployments.audit.histories import (
    compare_orders,
    is_steady,
    where_written,
    with_history,
    without_steadiness,
)
from deployments.audit.identity import slow_libraries
from deployments.audit.process import Outcome, cores, run_phase, start_server
from deployments.audit.target import Known, Target
from deployments.audit.verdict import batching_of, fails, mode_of, verdict_of

PHASES = "deployments.audit.phases"
OVERLAPS = "deployments.audit.overlaps"
ORDERS = ((0, 2), (0, 1))
"""The calls with which orders begin, of each process that loads the model. Two begin alike: they differ only
by a clock or by chance that no seed governs."""
SHARES = {"threads": 0.25, "copies": 0.1, "cold": 0.15, "orders": 0.04, "batches": 0.1, "measured": 0.03}
"""Of the budget, for searching; a third goes into starting processes and loading the model in each."""
GRACE_S = 20.0
"""For a phase beyond its share: loading, warming up, a trial that has begun."""
MANY = 10**6
"""Runs of a search that is cut off by a death, not by a number."""
ASKS = {
    "alone": "one call at a time: random numbers, modes, what is written",
    "threads": "calls that overlap in one instance",
    "cold": "first calls that overlap",
    "copies": "calls that overlap in two instances",
    "orders": "the calls in another order",
    "batches": "items in other company, and padded",
    "measured": "memory and speed, alone on the machine",
}
"""What is shown as progress."""
CONFIRMATIONS = 2
"""Fresh processes that must show a race again before it is reported."""


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
    _cores: "SimpleQueue[int | None]" = field(default_factory=SimpleQueue, init=False)
    """Not in use by a phase."""

    def run(self) -> dict[str, Any]:
        """The report, as JSON. Raises AuditFailed."""
        began = time.monotonic()
        stopped = threading.Event()
        if self.target.device == "cpu":
            start_server(slow_libraries(self.target))
        for core in cores():
            self._cores.put(core)
        try:
            return self._run(stopped, began)
        finally:
            stopped.set()

    def _run(self, stopped: threading.Event, began: float) -> dict[str, Any]:
        alone = self._alone(stopped)
        found = self._others(stopped, alone)
        order = [one for both in zip(*found["orders"], strict=True) for one in both]
        properties = {
            **found["one instance"],
            "copy_safe": _copies(found["copies"], found["one instance"]["thread_safe"]),
            "order_independent": compare_orders(order, alone),
            **_batch_properties(found["batches"]),
            "deterministic": alone["deterministic"],
            "eval_mode": alone["eval_mode"],
        }
        properties = with_history(properties)
        if not is_steady(order):
            properties = without_steadiness(properties)
        is_shareable = properties["thread_safe"].holds is True
        costs = self._phase(stopped, "measured", alone["known"], self._share("measured"), is_shareable)
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
            "known": alone["known"].as_json(),
            "took_s": round(time.monotonic() - began, 1),
        }  # fmt: skip

    def _alone(self, stopped: threading.Event) -> dict[str, Any]:
        """What the phases without threads found. Raises AuditFailed."""
        with ThreadPoolExecutor(1) as other:
            running = other.submit(self._process, stopped, "writes")
            try:
                whole = self._phase(stopped, "alone")
            except BaseException:
                stopped.set()
                raise
            if whole.error:
                stopped.set()
                raise AuditFailed(whole.error)
            written = running.result()
        if written.error:
            raise AuditFailed(written.error)
        is_same = whole.value["weights"] == written.value["weights"]
        return {
            **whole.value,
            **written.value,
            "calls": names_of(whole.value["known"]),
            "weights": whole.value["weights"] if is_same else None,  # made at load
        }

    def _others(self, stopped: threading.Event, alone: Mapping[str, Any]) -> dict[str, Any]:
        known = alone["known"]
        warm: list[Property] = []  # what threads in one instance do, once it is found
        jobs: dict[str, Callable[[], Any]] = {
            "one instance": partial(self._one_instance, stopped, alone, warm),
        }
        for n, begins in enumerate(ORDERS):
            jobs[f"orders {n}"] = partial(self._orders, stopped, known, begins)
        jobs["batches"] = partial(self._phase, stopped, "batches", known, self._share("batches"))
        jobs["copies"] = lambda: self._race(stopped, "copies", alone, is_known=any(one.holds for one in warm))
        with ThreadPoolExecutor(min(4, len(cores()))) as pool:
            running = {name: pool.submit(job) for name, job in jobs.items()}
            try:
                found = {name: job.result() for name, job in running.items()}
                return {**found, "orders": [found.pop(f"orders {n}") for n in range(len(ORDERS))]}
            except BaseException:  # Ctrl-C: what runs ends at once, what waits never begins
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _orders(self, stopped: threading.Event, known: Known, begins: Sequence[int]) -> list[Outcome]:
        """One for each order. A model that can't be forked has each made by a phase of its own."""
        outcomes: list[Outcome] = []
        while left := [call % len(known.calls) for call in begins[len(outcomes) :]]:
            outcome = self._phase(stopped, "orders", known, left, self._share("orders"))
            if outcome.error:
                return [*outcomes, *[outcome] * len(left)]
            outcomes += [Outcome(one) for one in outcome.value]
        return outcomes

    def _share(self, phase: str) -> float:
        return SHARES[phase] * self.budget_s

    def _phase(self, stopped: threading.Event, phase: str, *arguments: Any) -> Outcome:
        self.progress(ASKS.get(phase) or ASKS[next(one for one in arguments if isinstance(one, str))])
        return self._process(stopped, phase, *arguments)

    def _process(self, stopped: threading.Event, phase: str, *arguments: Any) -> Outcome:
        if phase == "measured" or self.target.device != "cpu":
            return self._in_process(stopped, None, phase, *arguments)
        core = self._cores.get()
        try:
            return self._in_process(stopped, core, phase, *arguments)
        finally:
            self._cores.put(core)

    def _in_process(self, stopped: threading.Event, core: int | None, phase: str, *arguments: Any) -> Outcome:
        module = OVERLAPS if phase in ("search", "replay") else PHASES
        return run_phase(
            f"{module}:{phase}", self.target, *arguments, limit_s=self.budget_s + GRACE_S,
            is_forked=self.target.device == "cpu", core=core, stopped=stopped,
        )  # fmt: skip

    def _one_instance(
        self, stopped: threading.Event, alone: Mapping[str, Any], told: list[Property]
    ) -> dict[str, Property]:
        """Warm (`told` as soon as it is found) and cold; calls that race in a warmed-up instance race when
        they are its first, too."""
        warm = self._race(stopped, "threads", alone)
        told.append(warm)
        if warm.holds is False:
            cold = Property(False, f"as in a warmed-up instance: {warm.reason}", warm.evidence)
        else:
            cold = self._race(stopped, "cold", alone)
        return {"thread_safe": warm, "cold_start_safe": cold}

    def _race(
        self, stopped: threading.Event, kind: str, alone: Mapping[str, Any], *, is_known: bool = False
    ) -> Property:
        """From what a search found: a proof, nothing in so many trials, or a death that is a proof itself."""
        arguments = (alone["known"], kind, self.seed, self._share(kind), is_known)
        outcome = self._phase(stopped, "search", *arguments)
        if outcome.died and isinstance(outcome.last, dict):
            finding = {"trial": outcome.last, "runs": MANY}
            return self._proof(
                stopped, kind, alone, finding, f"the process died in an overlap: {outcome.error}"
            )
        if outcome.error:
            return Property(None, f"could not be decided: {outcome.error}")
        finding, across = outcome.value["found"], outcome.value["across"]
        if finding is not None:
            reason = f"thread {name_of(finding['thread'])} {finding['how']}{where_written(alone)}"
            proof = self._proof(stopped, kind, alone, {**finding, "across": across}, reason)
            if across is None or proof.holds is False:
                return proof
        if across is not None:
            call = " + ".join(alone["calls"][across])
            says = f"{call} is answered otherwise by a second instance once the first was used"
            return Property(False, says, [{"call": call}])
        trials = outcome.last if isinstance(outcome.last, int) else 0
        if trials < alone["known"].least_trials:
            says = f"there was time for {trials} overlaps only: give more --budget-s"
            return Property(None, says, [{"trials": trials}])
        return Property(True, f"no difference in {trials} overlaps", [{"trials": trials}])

    def _proof(
        self,
        stopped: threading.Event,
        kind: str,
        alone: Mapping[str, Any],
        finding: dict[str, Any],
        reason: str,
    ) -> Property:
        """A race, once fresh processes have shown it again: by its trial alone, or after all before it."""
        trial = finding["trial"]
        for prefix in (None, (self.seed, finding["runs"])):
            again = [
                self._process(stopped, "replay", alone["known"], kind, trial, prefix)
                for _ in range(CONFIRMATIONS)
            ]
            if all(one.died or one.value is not None for one in again):
                evidence = self._evidence(kind, trial, alone) | finding | {"prefix": prefix}
                return Property(False, reason, [evidence])
        return Property(None, f"seen once, but not again in fresh processes: {reason}", [{"trial": trial}])

    def _evidence(self, kind: str, trial: dict[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
        named = json.dumps([self.name, kind, trial], sort_keys=True)
        return {
            "replay": hashlib.sha256(named.encode()).hexdigest()[:10],
            "kind": kind,
            "trial": trial,
            "calls": {
                name_of(n): alone["calls"][call if kind in ("threads", "cold") else call // 2]
                for n, call in enumerate(trial["calls"])
            },
            "writes": (alone["writes"] or alone["first_writes"])[:6],
        }


def names_of(known: Known) -> list[list[str]]:
    return [[str(item) for item in batch] for batch in known.calls]


def name_of(thread: int) -> str:
    """Threads as people call them: A, B, ..."""
    return "ABCDEFGHI"[thread % 9]


def _copies(copies: Property, threads: Property) -> Property:
    """Two instances share less than two threads of one do: where those are safe, few overlaps are enough."""
    trials = copies.evidence[0].get("trials", 0) if copies.evidence else 0
    if copies.holds is None and threads.holds and trials:
        says = f"no difference in {trials} overlaps, nor where one instance shares all of its state"
        return Property(True, says, [*copies.evidence, *threads.evidence])
    return copies


def _batch_properties(outcome: Outcome) -> dict[str, Property]:
    if outcome.error:
        unknown = Property(None, f"could not be decided: {outcome.error}")
        return {"batch_invariant": unknown, "padding_invariant": unknown}
    return dict(outcome.value)
