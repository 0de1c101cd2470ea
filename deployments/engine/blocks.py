"""KV memory by the block: who holds which, what the prefix cache keeps, what is free.

Owns: the exact account (held + idle + free = all, always) and what the cache holds. Must not know: who
goes next, where a block lies. Blocks of shared prefixes are vLLM's idea (Kwon et al., "PagedAttention",
SOSP 2023, and its automatic prefix caching); here a block is named by its parent and its own tokens,
not by a hash alone: no collision can serve one user another's text.

Two ways of sharing, one account:
- in place (`shares`): a block is a page, and sequences with a common prefix hold the same pages;
- by copy: each sequence has a row of its own. Cached blocks are loaded into it and saved from it; both
  copies are counted.
"""

from collections import OrderedDict
from dataclasses import dataclass

from deployments.engine.sequence import Copy, Sequence

BlockName = tuple[int, tuple[int, ...]]
"""(uid of the content before it, own tokens); uid 0 is the empty prefix."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a cached block holds. uid: names this prefix for its children."""

    name: BlockName
    uid: int


@dataclass(frozen=True, slots=True)
class Link:
    """A full computed block of a sequence, and the cached block of the same content, if there is one."""

    index: int
    content: Content
    cached: int | None


class BlockPool:
    """`blocks` blocks of `units` units each. The engine's; not thread-safe."""

    def __init__(self, blocks: int, units: int, *, shares: bool) -> None:
        self.total = blocks
        self.units = units
        self.shares = shares
        self._free = list(range(blocks - 1, -1, -1))  # the lowest is taken first: less memory is touched
        self._holders = [0] * blocks
        self._contents: dict[int, Content] = {}
        self._by_name: dict[BlockName, int] = {}
        # Cached and held by nobody, oldest first. A parent is never older than its children, so what
        # is evicted is always a leaf.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._pinned: list[int] = []
        self._last_uid = 0

    @property
    def available(self) -> int:
        """Blocks to be had now: free, or cached and idle."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        return len(self._contents)

    @property
    def used(self) -> int:
        """Held by sequences, or pinned for a copy."""
        return self.total - self.available

    def needed(self, units: int) -> int:
        return -(-units // self.units)

    # -- the life of a sequence -----------------------------------------------------------------------

    def match(self, sequence: Sequence, *, spare: int) -> list[int] | None:
        """The cached blocks to begin with, maybe none; None where there is no room for its known units.

        spare: blocks that must stay available for those that run. At least one unit is left to compute.
        """
        matched: list[int] = []
        uid = 0
        for start in range(0, sequence.known - self.units, self.units):
            block = self._by_name.get((uid, tuple(sequence.tokens[start : start + self.units])))
            if block is None:
                break
            matched.append(block)
            uid = self._contents[block].uid
        if self._fits(sequence, matched, spare):
            return matched
        # By copy the cached blocks are needed beside the row's own: better without them than never.
        return [] if matched and self._fits(sequence, [], spare) else None

    def _fits(self, sequence: Sequence, matched: list[int], spare: int) -> bool:
        own = self.needed(sequence.known) - (len(matched) if self.shares else 0)
        idle = sum(block in self._idle for block in matched)
        return own + idle + spare <= self.available

    def open(self, sequence: Sequence, matched: list[int]) -> list[Copy]:
        """Hold blocks for all that is known of it; `matched` is what `match` gave. Copies to load."""
        for block in matched:
            self._hold(block)
        sequence.computed = len(matched) * self.units
        if self.shares:
            sequence.blocks = list(matched)
        has_grown = self.grow(sequence, sequence.known)
        assert has_grown, "match() found room"
        if self.shares:
            return []
        self._pinned += matched
        return [Copy(sequence.slot, block, i * self.units, self.units) for i, block in enumerate(matched)]

    def grow(self, sequence: Sequence, units: int) -> bool:
        """Hold blocks for `units`; False, and nothing changed, where there are not enough."""
        missing = self.needed(units) - len(sequence.blocks)
        if missing > self.available:
            return False
        sequence.blocks += [self._take() for _ in range(missing)]
        return True

    def unpin(self) -> None:
        """The copies of the last step are made."""
        for block in reversed(self._pinned):
            self._drop(block)
        self._pinned.clear()

    def publish(self, sequence: Sequence) -> list[Copy]:
        """Put its computed full blocks into the cache while it goes on. Copies to save.

        By copy this takes only blocks that nobody else holds, the oldest of the cache after the free.
        """
        saves: list[Copy] = []
        chain: list[int] = []  # held while we take others, and idle again from its leaf on
        for link in self._links(sequence):
            own = sequence.blocks[link.index]
            if self.shares:
                self._share(sequence, link, own)
            elif link.cached is not None:
                self._hold(link.cached)
                chain.append(link.cached)
            elif self.available:
                chain.append(self._take())
                self._name(chain[-1], link.content)
                saves.append(Copy(sequence.slot, chain[-1], link.index * self.units, self.units))
            else:
                break
        for block in reversed(chain):
            self._drop(block)
        return saves

    def _share(self, sequence: Sequence, link: Link, own: int) -> None:
        if link.cached is None:
            self._name(own, link.content)
        elif link.cached != own:  # computed twice: both go on with the one that is cached
            self._hold(link.cached)
            sequence.blocks[link.index] = link.cached
            self._drop(own)

    def release(self, sequence: Sequence, *, keeps: bool = True) -> list[Copy]:
        """It ended or is preempted. What is full and computed stays in the cache. Copies to save."""
        saves: list[Copy] = []
        others: dict[int, int] = {}
        for link in self._links(sequence) if keeps else []:
            own = sequence.blocks[link.index]
            if link.cached is None:
                self._name(own, link.content)
                if not self.shares:
                    saves.append(Copy(sequence.slot, own, link.index * self.units, self.units))
            elif link.cached != own:
                self._hold(link.cached)  # made young again, before its children
                others[link.index] = link.cached
        for index in range(len(sequence.blocks) - 1, -1, -1):
            self._drop(sequence.blocks[index])
            if index in others:
                self._drop(others[index])
        sequence.blocks = []
        sequence.computed = 0
        return saves

    def forget(self) -> None:
        """Empty the cache: a step failed, so what it should have saved may not be there."""
        self._free += self._idle
        self._idle.clear()
        self._contents.clear()
        self._by_name.clear()

    # -- one block --------------------------------------------------------------------------------------

    def _links(self, sequence: Sequence) -> list[Link]:
        links: list[Link] = []
        uid = 0
        for index in range(min(sequence.computed, len(sequence.tokens)) // self.units):
            start = index * self.units
            name = (uid, tuple(sequence.tokens[start : start + self.units]))
            block = self._by_name.get(name)
            if block is None:
                self._last_uid = uid = self._last_uid + 1
                links.append(Link(index, Content(name, uid), None))
            else:
                links.append(Link(index, self._contents[block], block))
                uid = self._contents[block].uid
        return links

    def _name(self, block: int, content: Content) -> None:
        self._contents[block] = content
        self._by_name[content.name] = block

    def _take(self) -> int:
        """A block for one holder; only with one available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_name[self._contents.pop(block).name]
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] += 1

    def _drop(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._contents:
            self._idle[block] = None
        else:
            self._free.append(block)
