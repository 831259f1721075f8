"""Pages: sharing, recycling and the books, under random use."""

from __future__ import annotations

import random

import pytest

from server.core import SamplingParams, Sequence, Timings
from server.scheduler.blocks import BlockManager


def sequence(tokens: list[int], name: str = "s") -> Sequence:
    return Sequence(name, list(tokens), len(tokens), SamplingParams(max_tokens=8), Timings(0.0))


def compute(blocks: BlockManager, item: Sequence) -> None:
    assert blocks.grow(item, len(item.token_ids))
    item.num_computed_tokens = len(item.token_ids)
    blocks.commit(item)


def test_a_released_prefix_is_found_again_and_never_covers_the_last_token() -> None:
    blocks = BlockManager(8, 4)
    first = sequence(list(range(10)))
    compute(blocks, first)
    pages = first.block_table[:2]
    blocks.release(first)
    assert blocks.num_free == 8
    assert blocks.match_prefix(list(range(10))) == pages
    assert blocks.match_prefix(list(range(8))) == pages[:1]  # token 7 must be run
    assert blocks.match_prefix([0, 1, 2, 99, 4, 5, 6, 7, 8]) == []


def test_equal_pages_after_different_beginnings_are_not_confused() -> None:
    blocks = BlockManager(8, 2)
    first = sequence([1, 2, 7, 7, 0])
    compute(blocks, first)
    assert blocks.match_prefix([3, 4, 7, 7, 0]) == []


def test_two_live_sequences_hold_a_shared_page_until_both_end() -> None:
    blocks = BlockManager(4, 2)
    first = sequence([1, 2, 3], "a")
    compute(blocks, first)
    second = sequence([1, 2, 9], "b")
    blocks.adopt(second, blocks.match_prefix(second.token_ids))
    compute(blocks, second)
    assert second.block_table[0] == first.block_table[0]
    assert blocks.num_free == 1
    blocks.check([first, second])
    blocks.release(first)
    assert blocks.num_free == 2
    blocks.check([second])


def test_growth_beyond_what_is_free_changes_nothing() -> None:
    blocks = BlockManager(2, 4)
    item = sequence(list(range(9)))
    assert not blocks.grow(item, 9)
    assert item.block_table == []
    assert blocks.num_free == 2


def test_the_least_recently_used_content_goes_first() -> None:
    blocks = BlockManager(2, 2)
    old, new = sequence([1, 2], "old"), sequence([3, 4], "new")
    compute(blocks, old)
    compute(blocks, new)
    blocks.release(old)
    blocks.release(new)
    compute(blocks, sequence([5, 6], "third"))
    assert blocks.match_prefix([1, 2, 0]) == []
    assert blocks.match_prefix([3, 4, 0]) != []


def test_check_finds_a_stolen_page() -> None:
    blocks = BlockManager(4, 2)
    item = sequence([1, 2, 3])
    compute(blocks, item)
    item.block_table.append(item.block_table[0])
    with pytest.raises(AssertionError, match="twice"):
        blocks.check([item])
    item.block_table.pop()
    with pytest.raises(AssertionError, match="holders"):
        blocks.check([])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    blocks = BlockManager(24, 4)
    live: list[Sequence] = []
    for turn in range(400):
        if live and (rng.random() < 0.4 or blocks.num_free < 6):
            blocks.release(live.pop(rng.randrange(len(live))))
        else:
            item = sequence([rng.randrange(2) for _ in range(rng.randrange(1, 22))], str(turn))
            blocks.adopt(item, blocks.match_prefix(item.token_ids))
            if blocks.grow(item, len(item.token_ids)):
                item.num_computed_tokens = len(item.token_ids)
                blocks.commit(item)
                live.append(item)
            else:
                blocks.release(item)
        blocks.check(live)
    for item in live:
        blocks.release(item)
    assert blocks.num_free == 24


def test_pages_are_shared_only_under_the_same_salt() -> None:
    blocks = BlockManager(16, 2)
    salted = sequence([1, 2, 3, 4, 5], "a")
    salted.cache_salt = "mine"
    compute(blocks, salted)
    assert blocks.match_prefix(salted.token_ids) == []
    assert blocks.match_prefix(salted.token_ids, "yours") == []
    assert blocks.match_prefix(salted.token_ids, "mine") == salted.block_table[:2]
    longer = sequence([1, 2, 3, 4, 5, 6, 7], "b")
    longer.cache_salt = "mine"
    blocks.adopt(longer, blocks.match_prefix(longer.token_ids, "mine"))
    compute(blocks, longer)
    assert blocks.match_prefix([*longer.token_ids, 9], "mine") == longer.block_table[:3]
    plain = sequence([1, 2, 3, 4, 5], "c")
    compute(blocks, plain)
    assert blocks.match_prefix(plain.token_ids) == plain.block_table[:2]
    blocks.check([salted, longer, plain])
