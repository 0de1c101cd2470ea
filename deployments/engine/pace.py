"""How much of a prompt may run beside streams that already talk, learned from measured steps.

Owns: the size of a prompt's chunk. Must not know: sequences, blocks, clocks (it is told how long steps
took). A step with a chunk may take STALL times as long as the same step without it; Sarathi-Serve (Agrawal
et al., OSDI 2024) bounds it by a fixed token count, which fits one model on one machine.
"""

STALL = 1.6
"""A step with a chunk aims at so many times the step without: 3/8 of the time goes to newcomers. The promise
to those that talk is a gap of three times; the rest is noise, where others take turns on the cores."""
FIRST_CHUNK = 32
"""Before anything is learned: from about 24 rows on a CPU is bound by arithmetic, no longer by weights."""
SMALLEST_CHUNK = 16
MEMORY = 0.8
OUTLIER = 2.0
"""One step counts as at most so many times slower or faster than expected. Where other programs take turns on
the cores, some steps take two or three times as long; halving the chunk at each kept it at the smallest."""


class Pace:
    """One for each engine; `most` is the token budget of a step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._unit_s: float | None = None  # what a unit of a chunk adds to a step
        self._plain_s: dict[int, float] = {}  # step time without a chunk, by power of two of its rows

    def chunk(self, talking: int) -> int:
        """Units of prompts that may join a step with this many rows that talk."""
        room = self._most - talking
        if not talking:
            return room
        plain_s = self._plain(talking)
        chunk: float = FIRST_CHUNK
        if plain_s is not None and self._unit_s is not None:
            chunk = max(SMALLEST_CHUNK, (STALL - 1.0) * plain_s / self._unit_s)
        return max(0, min(room, int(chunk)))

    def observe(self, talking: int, chunk: int, elapsed_s: float) -> None:
        """A step took `elapsed_s` with this many rows and this much of prompts."""
        if not talking or elapsed_s <= 0.0:
            return
        if not chunk:
            known = self._plain_s.get(talking.bit_length(), elapsed_s)
            self._plain_s[talking.bit_length()] = known + (1.0 - MEMORY) * (elapsed_s - known)
            return
        plain_s = self._plain(talking)
        if plain_s is None:
            return
        known = self._unit_s or (STALL - 1.0) * plain_s / FIRST_CHUNK
        unit_s = min(OUTLIER * known, max(known / OUTLIER, (elapsed_s - plain_s) / chunk))
        # The short end of a prompt says little.
        weight = min(1.0, chunk / max(1, self.chunk(talking)))
        self._unit_s = known + (1.0 - MEMORY) * weight * (unit_s - known)

    def _plain(self, talking: int) -> float | None:
        if not self._plain_s:
            return None
        nearest = min(self._plain_s, key=lambda size: abs(size - talking.bit_length()))
        return self._plain_s[nearest]
