"""What the audit says of a property, with the words and the evidence for it.

Owns: these values and their JSON. Must not know: how a property is decided.
"""

from dataclasses import dataclass, field
from typing import Any

PROPERTIES = (
    "thread_safe", "cold_start_safe", "copy_safe", "order_independent", "batch_invariant",
    "padding_invariant", "deterministic", "eval_mode",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Property:
    """holds: True, False, or None where it could not be decided; `reason` says why in a sentence.

    evidence: JSON objects; a race's holds the schedule that replays it, and its id.
    """

    holds: bool | None
    reason: str
    evidence: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"holds": self.holds, "reason": self.reason, "evidence": self.evidence}
