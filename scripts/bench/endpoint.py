"""How to ask a server for one item: ours and the peers' differ in path and JSON, not in the load.

Owns: rendering a request for one item, reading the value out of an answer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.bench.client import Sample, Shot, request


@dataclass(frozen=True, slots=True)
class Endpoint:
    """wrap: item -> the JSON body. unwrap: the decoded answer -> the item's value."""

    path: str
    wrap: Callable[[Any], Any]
    unwrap: Callable[[Any], Any]

    def body(self, item: Any) -> bytes:
        return json.dumps(self.wrap(item)).encode()

    def shot(
        self,
        item: Any,
        *,
        at_s: float = 0.0,
        give_up_s: float | None = None,
        timeout_ms: float | None = None,
        tag: str = "",
    ) -> Shot:
        """One request. timeout_ms: say so to the server, in our own header (others ignore it)."""
        said = "" if timeout_ms is None else f"X-Request-Timeout-Ms: {timeout_ms:g}\r\n"
        return Shot(request(self.path, self.body(item), headers=said), at_s, give_up_s, tag)

    def value(self, sample: Sample) -> Any:
        """What the answer holds; None where it isn't such an answer."""
        try:
            return self.unwrap(json.loads(sample.body))
        except (ValueError, KeyError, IndexError, TypeError):
            return None


def ours(app: str) -> Endpoint:
    """POST /APP/predict with one item."""
    return Endpoint(f"/{app}/predict", lambda item: {"inputs": [item]}, lambda answer: answer["outputs"][0])
