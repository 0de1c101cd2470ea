"""From a verdict, and what the configuration asks for, to how a replica uses its model.

Owns: those rules, and the words for what was overridden or lacks evidence. Must not know: how a verdict came
about, Ray, torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.runtime.slots import Sharing

Report = Mapping[str, Any]


class BatchingRefused(Exception):
    """The configuration asks for batches of a model whose answers depend on batch-mates."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the configuration says. batches: it names a batch size of more than one itself, as `key`."""

    safety: str = "auto"
    slots: int = 1
    batches: bool = False
    allow_batch_dependence: bool = False
    key: str = "max_batch_size"


@dataclass(frozen=True, slots=True)
class Decision:
    """How the model is used; warnings: for the log, each a sentence that says what to do."""

    sharing: Sharing
    warnings: list[str] = field(default_factory=list)


def decide(asked: Asked, report: Report | None) -> Decision:
    """report: None where the model was not audited; one with "failed" where it could not be.

    Raises BatchingRefused, which names the keys to set.
    """
    if report is None or "failed" in report:
        return _without_evidence(asked, report)
    mode = report["mode"] if asked.safety == "auto" else asked.safety
    overridden = [] if asked.safety == "auto" else _overridden(asked.safety, report)
    warnings = [*overridden]
    slots = asked.slots
    if mode in ("processes", "exclusive") and slots > 1:
        slots = 1
        warnings.append(
            f"slots: 1 is used of {asked.slots}, since the audit says {mode}; for more at once set slots: 1 "
            f"and num_replicas: {asked.slots} in the deployment"
        )
    elif slots > 1:
        warnings += _without_gain(report, mode)
    size = _batch_size(asked, report, warnings)
    sharing = Sharing(
        mode,
        slots,
        max_batch_size=size,
        is_whole=mode != "shared",
        in_order=mode == "exclusive",
        verdict=report["verdict"],
        reason=_reason(report, mode),
        warning="".join(overridden),
    )
    return Decision(sharing, warnings)


def _without_evidence(asked: Asked, report: Report | None) -> Decision:
    if asked.safety == "auto":
        why = "the model was not audited" if report is None else f"the audit failed: {report['failed']}"
        mode = "pool" if asked.slots > 1 else "exclusive"
        warning = (
            f"{why}. Each slot has an instance of its own and batches are formed as configured, on the "
            "author's word: give the class examples(), or name `safety` yourself"
        )
        return Decision(Sharing(mode, asked.slots, verdict="not audited", reason=why), [warning])
    sharing = Sharing(
        asked.safety,
        asked.slots,
        is_whole=asked.safety != "shared",
        in_order=asked.safety == "exclusive",
        verdict="not audited",
        reason=(
            f"safety: {asked.safety} in the configuration"
            if asked.key == "max_batch_size"
            else "its steps share one thread; brimful audit NAME stores a verdict on them"
        ),
    )
    return Decision(sharing)


LEAST_GAIN = 1.05
"""Of a second slot, by the audit's measurement; less is lost in what two runs differ by."""


def _without_gain(report: Report, mode: str) -> list[str]:
    """Where one process has nothing left for a second slot: the interpreter's lock, or all cores in use."""
    name = "two_threads_one_instance" if mode == "shared" else "pool_of_2"
    gain = report.get("measured", {}).get("speed_up", {}).get(name)
    if gain is None or gain >= LEAST_GAIN:
        return []
    return [
        f"slots: a second one gained {gain:g} times when it was measured; bigger batches, or replicas "
        "(num_replicas) instead of slots, use the machine better (brimful tune measures it)"
    ]


_RANK = {"shared": 0, "pool": 1, "processes": 2, "exclusive": 3}


def _overridden(safety: str, report: Report) -> list[str]:
    if _RANK[safety] >= _RANK[report["mode"]]:
        return []
    return [
        f"safety: {safety} is used as configured, but the audit says {report['mode']} ({report['verdict']}): "
        f"{_reason(report, report['mode'])}"
    ]


def _batch_size(asked: Asked, report: Report, warnings: list[str]) -> int | None:
    """1 where the evidence is against batches; None: as configured."""
    if report["batching"] == "dynamic":
        return None
    mates, padding = (report["properties"][name] for name in ("batch_invariant", "padding_invariant"))
    found = padding if padding["holds"] is False and mates["holds"] is not False else mates
    if asked.allow_batch_dependence:
        warnings.append(f"batches are formed (allow_batch_dependence), though {found['reason']}")
        return None
    if asked.batches and found["holds"] is False:
        raise BatchingRefused(
            f"{asked.key}: the audit shows that an answer depends on its batch-mates: {found['reason']}. "
            f"Set {asked.key}: 1, or allow_batch_dependence: true if that is meant"
        )
    warnings.append(f"items run one by one, since {found['reason']}")
    return 1


def _reason(report: Report, mode: str) -> str:
    name = {"shared": "thread_safe", "pool": "thread_safe", "processes": "copy_safe"}.get(
        mode, "order_independent"
    )
    return str(report["properties"][name]["reason"])
