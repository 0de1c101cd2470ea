"""The account of blocks and the prefix cache, in both ways of sharing."""

import pytest

from deployments.engine.blocks import BlockPool
from deployments.engine.sequence import Copy, Sequence

UNITS = 4


def text(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def sequence(tokens: list[int], *, slot: int = 0) -> Sequence:
    return Sequence(tokens=list(tokens), known=len(tokens), max_units=len(tokens) + 8, slot=slot)


def begin(pool: BlockPool, one: Sequence, *, spare: int = 0) -> list[Copy]:
    """As a newcomer: match, open; then all of it is computed."""
    matched = pool.match(one, spare=spare)
    assert matched is not None
    loads = pool.open(one, matched)
    one.cached, one.computed = one.computed, one.known
    return loads


def run(pool: BlockPool, tokens: list[int]) -> Sequence:
    """A sequence's whole life."""
    one = sequence(tokens)
    begin(pool, one)
    pool.unpin()
    pool.release(one)
    return one


@pytest.fixture(params=[True, False], ids=["in place", "by copy"])
def pool(request: pytest.FixtureRequest) -> BlockPool:
    return BlockPool(16, UNITS, shares=request.param)


@pytest.fixture
def pages() -> BlockPool:
    return BlockPool(16, UNITS, shares=True)


@pytest.fixture
def rows() -> BlockPool:
    return BlockPool(16, UNITS, shares=False)


def test_units_round_up_to_whole_blocks(pool: BlockPool) -> None:
    assert [pool.needed(units) for units in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_second_text_with_the_same_beginning_finds_it_computed(pool: BlockPool) -> None:
    run(pool, text(10))
    second = sequence([*text(8), 90, 91, 92])
    begin(pool, second)
    assert second.cached == 8


def test_at_least_one_unit_is_left_to_compute(pool: BlockPool) -> None:
    run(pool, text(8))
    second = sequence(text(8))
    begin(pool, second)
    assert second.cached == 4


def test_the_same_block_behind_another_beginning_is_another_block(pool: BlockPool) -> None:
    run(pool, text(8))
    second = sequence(text(4, 50) + text(4, 4) + [1])
    begin(pool, second)
    assert second.cached == 0


def test_half_a_block_is_not_cached(pool: BlockPool) -> None:
    run(pool, text(7))
    assert pool.cached == 1


def test_what_ended_frees_its_blocks_and_leaves_them_in_the_cache(pool: BlockPool) -> None:
    run(pool, text(10))
    assert (pool.used, pool.available, pool.cached) == (0, 16, 2)


def test_what_failed_leaves_nothing_in_the_cache(pool: BlockPool) -> None:
    one = sequence(text(10))
    begin(pool, one)
    pool.release(one, keeps=False)
    assert (pool.used, pool.cached) == (0, 0)


def test_two_at_once_hold_a_shared_beginning_once_in_place(pages: BlockPool) -> None:
    run(pages, text(9))
    first, second = sequence(text(9)), sequence(text(9))
    assert begin(pages, first) == begin(pages, second) == []
    assert first.blocks[:2] == second.blocks[:2]
    assert pages.used == 4


def test_by_copy_each_holds_a_row_and_the_cached_blocks_while_they_are_copied(rows: BlockPool) -> None:
    run(rows, text(9))
    one = sequence(text(9), slot=3)
    loads = begin(rows, one)
    assert [(load.slot, load.start, load.count) for load in loads] == [(3, 0, 4), (3, 4, 4)]
    assert rows.used == 3 + 2
    rows.unpin()
    assert rows.used == 3


def test_by_copy_a_cache_hit_that_does_not_fit_beside_the_row_is_given_up() -> None:
    """Better without the cached blocks than never."""
    pool = BlockPool(4, UNITS, shares=False)
    run(pool, text(9))
    one = sequence(text(13))
    assert pool.match(one, spare=0) == []
    begin(pool, one)
    assert one.cached == 0
    assert pool.used == 4


def test_spare_blocks_stay_available(pool: BlockPool) -> None:
    one = sequence(text(60))
    assert pool.match(one, spare=1) == []
    assert pool.match(one, spare=2) is None


def test_growing_takes_nothing_where_not_all_is_to_be_had(pool: BlockPool) -> None:
    one = sequence(text(40))
    begin(pool, one)
    assert not pool.grow(one, 65)
    assert (len(one.blocks), pool.available) == (10, 6)
    assert pool.grow(one, 64)
    assert pool.available == 0


def test_the_oldest_text_is_evicted_first_and_its_end_before_its_beginning(pool: BlockPool) -> None:
    run(pool, text(12))  # three blocks
    run(pool, text(12, 100))  # three more
    taker = sequence(text(4 * 11 + 1, 200))  # the ten that are free, and two
    begin(pool, taker)
    old, new = sequence(text(13)), sequence(text(13, 100))
    assert len(pool.match(old, spare=-100) or []) == 1
    assert len(pool.match(new, spare=-100) or []) == 3


def test_a_hit_makes_a_text_young_again(pool: BlockPool) -> None:
    run(pool, text(8))
    run(pool, text(8, 100))
    run(pool, text(8))
    begin(pool, sequence(text(4 * 13, 200)))  # evicts one
    assert len(pool.match(sequence(text(9)), spare=-100) or []) == 2
    assert len(pool.match(sequence(text(9, 100)), spare=-100) or []) == 1


def test_what_is_held_is_never_evicted(pages: BlockPool) -> None:
    run(pages, text(9))
    holder = sequence(text(9))
    begin(pages, holder)
    begin(pages, sequence(text(4 * 13, 200)))
    assert pages.available == 0
    assert pages.match(sequence(text(9)), spare=-100) == holder.blocks[:2]


def test_a_text_that_was_computed_twice_is_held_once_in_place(pages: BlockPool) -> None:
    first, second = sequence(text(9)), sequence(text(9))
    begin(pages, first)
    begin(pages, second)
    assert pages.used == 6
    pages.publish(first)
    pages.publish(second)
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    assert pages.used == 4


def test_by_copy_a_running_text_is_saved_only_once(rows: BlockPool) -> None:
    first, second = sequence(text(9), slot=0), sequence(text(9), slot=1)
    begin(rows, first)
    begin(rows, second)
    saves = rows.publish(first)
    assert [(save.slot, save.start) for save in saves] == [(0, 0), (0, 4)]
    assert rows.publish(second) == []
    assert rows.release(first) == []
    assert rows.cached == 2


def test_by_copy_publishing_takes_no_more_than_there_is() -> None:
    pool = BlockPool(4, UNITS, shares=False)
    one = sequence(text(12))
    begin(pool, one)
    assert len(pool.publish(one)) == 1
    assert (pool.used, pool.cached) == (3, 1)


def test_by_copy_a_row_that_ends_becomes_the_cached_text(rows: BlockPool) -> None:
    one = sequence(text(9), slot=2)
    begin(rows, one)
    blocks = list(one.blocks)
    saves = rows.release(one)
    assert [(save.slot, save.start) for save in saves] == [(2, 0), (2, 4)]
    assert [save.block for save in saves] == blocks[:2]


def test_forgetting_empties_the_cache_and_takes_nothing_from_who_runs(pool: BlockPool) -> None:
    run(pool, text(9))
    holder = sequence(text(9))
    begin(pool, holder)
    pool.forget()
    pool.unpin()
    assert pool.cached == 0
    assert (pool.used, pool.available) == (3, 13)
    pool.release(holder, keeps=False)
    assert (pool.used, pool.available) == (0, 16)
    assert pool.match(sequence(text(9)), spare=0) == []


def test_forgetting_while_copies_are_pinned_gives_them_back_with_the_step(rows: BlockPool) -> None:
    run(rows, text(9))
    one = sequence(text(9))
    begin(rows, one)
    rows.forget()
    assert rows.used == 5
    rows.unpin()
    rows.release(one)
    assert (rows.used, rows.available) == (0, 16)
