"""Items that a model is measured with: its own examples(), or a file of the caller's.

Owns: reading, checking and dealing them out. Must not know: what is measured.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deployments.core.contract import ModelCard, RequestOptions, Service
from deployments.core.errors import InternalError, ServingError
from scripts.tune.points import CouldNotRun


def items_of(file: str | None, card: ModelCard) -> list[tuple[str, Any]]:
    """(where it stands, item) of the file's lines, or of the examples. Raises CouldNotRun."""
    if file is not None:
        return read_lines(Path(file))
    if not card.examples:
        raise CouldNotRun(
            "the model has no examples(): add a method that returns a few items, or give --inputs "
            "items.jsonl, one JSON item a line"
        )
    return [(f"examples()[{number}]", item) for number, item in enumerate(card.examples)]


def read_lines(file: Path) -> list[tuple[str, Any]]:
    """(where it stands, item); empty lines are left out. Raises CouldNotRun that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CouldNotRun(f"can't read {file}: {reason}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append((f"line {number} of {file.name}", json.loads(line)))
        except ValueError as error:
            raise CouldNotRun(f"line {number} of {file} is not JSON: {error}") from error
    if not items:
        raise CouldNotRun(f"{file} has no items: one JSON item a line")
    return items


async def cost_of(service: Service, item: Any, where: str) -> float:
    """Run it once; its cost in the model's unit. Raises CouldNotRun where it fails."""
    try:
        outcome = (await service.predict([item], RequestOptions())).outcomes[0]
    except ServingError as error:
        raise CouldNotRun(f"{where} fails: {reason_of(error)}") from error
    if outcome.error is not None:
        raise CouldNotRun(f"{where} fails: {reason_of(outcome.error)}")
    return outcome.cost


def dealt(items: Sequence[Any], seed: int = 5) -> Iterator[Any]:
    """All items over and over, each round shuffled anew: any stretch holds about the same mix."""
    source = random.Random(seed)
    deck = list(items)
    while True:
        source.shuffle(deck)
        yield from deck


def reason_of(error: ServingError) -> str:
    """Its text; of a bug also the last line of its traceback."""
    detail = error.detail if isinstance(error, InternalError) else None
    return f"{error}: {detail.strip().splitlines()[-1]}" if detail else str(error)
