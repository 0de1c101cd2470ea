"""A language model without tensors, which checks the KV memory that the engine promises it.

The next token is a function of all tokens before it, read from memory: from the sequence's row (blocks
by copy) or its pages (in place). A block that was given to two, loaded too late or freed too early
shows as a wrong token or a failed assertion.
"""

from deployments.engine.blocks import BlockPool
from deployments.engine.sequence import Advance, Sequence, Step, Work

VOCABULARY = 7  # small: equal prefixes happen


def next_token(tokens: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % VOCABULARY


def alone(prompt: list[int], count: int) -> list[int]:
    """What a sequence must give, whoever runs beside it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class ToyModel:
    """payload of its sequences: {"left": tokens to give, "given": those so far}."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.rows: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.cache: dict[int, list[int]] = {}
        self.ended: list[Sequence] = []

    def run(self, step: Step) -> list[Advance]:
        for copy in step.saves:
            row = self.rows[copy.slot][copy.start : copy.start + copy.count]
            assert len(row) == self.pool.units, "a save of units that were never computed"
            self.cache[copy.block] = row
        for slot in step.freed:
            self.rows.pop(slot, None)
        self.ended += step.ended
        for copy in step.loads:
            row = self.rows.setdefault(copy.slot, [])
            assert len(row) == copy.start
            row += self.cache[copy.block]
        return [self._advance(work) for work in step.work]

    def _advance(self, work: Work) -> Advance:
        sequence, end = work.sequence, work.start + work.count
        assert self.pool.needed(end) <= len(work.blocks), "units without a block"
        new = sequence.tokens[work.start : end]
        memory = self._pages(work, new) if self.pool.shares else self._row(work, new)
        assert memory == sequence.tokens[:end], "memory holds another text"
        if not work.is_last:
            return Advance()
        token = next_token(memory)
        sequence.payload["given"].append(token)
        is_done = len(sequence.payload["given"]) == sequence.payload["wanted"]
        return Advance(units=0 if is_done else 1, token=token, outputs=(token,), is_done=is_done)

    def _row(self, work: Work, new: list[int]) -> list[int]:
        row = self.rows.setdefault(work.sequence.slot, [])
        assert len(row) == work.start
        row += new
        return row

    def _pages(self, work: Work, new: list[int]) -> list[int]:
        units = self.pool.units
        for i, token in enumerate(new, work.start):
            page = self.pages.setdefault(work.blocks[i // units], [0] * units)
            page[i % units] = token
        text = [token for block in work.blocks for token in self.pages.get(block, [0] * units)]
        return text[: work.start + len(new)]


def chat(prompt: list[int], wanted: int, *, arrived: float = 0.0, **fields: object) -> Sequence:
    """A sequence of the toy model: `wanted` tokens after `prompt`."""
    return Sequence(
        payload={"wanted": wanted, "given": []},
        tokens=list(prompt),
        known=len(prompt),
        max_units=len(prompt) + wanted,
        arrived=arrived,
        **fields,  # type: ignore[arg-type]
    )
