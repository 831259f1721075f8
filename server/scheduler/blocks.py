"""Pages of the KV cache: who holds them, and which can be shared because they begin with the same tokens.

Not the tensors: only page numbers. A full page is known by the chain of tokens up to its end, so a prefix match is
exact, never a hash collision. A released page keeps its content until it is needed for something else (least
recently used first).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from server.core import Sequence

Node = int | str  # of the prefix tree: a page's number, or the root of a salt
PageKey = tuple[Node, tuple[int, ...]]  # (node of the page before, tokens of this page)
ROOT = 0  # of sequences without a salt
SEARCH_PAGES = 4096  # looked at for a run at most: bounds the time of an admission


class BlockManager:
    """Allocates, shares and recycles pages of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))  # front goes first
        self._holders = [0] * num_blocks
        self._keys: list[PageKey | None] = [None] * num_blocks
        self._nodes = [ROOT] * num_blocks  # node number of a page in the prefix tree, where it has a key
        self._index: dict[PageKey, int] = {}
        self._next_node = ROOT + 1
        self._cursor = 0  # where the next search for a run of pages begins
        self._chains: dict[Sequence, tuple[int, Node]] = {}  # pages entered in the tree, node of the last one

    @property
    def num_free(self) -> int:
        """Pages nobody holds, cached content included."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: list[int], salt: str | None = None) -> list[int]:
        """Pages that already hold the beginning of `token_ids`, never the last token: it must be run for logits.

        Only pages of sequences with the same `salt` are found.
        """
        pages: list[int] = []
        if not self.prefix_caching:
            return pages
        node, size = _root(salt), self.block_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            page = self._index.get((node, tuple(token_ids[start : start + size])))
            if page is None:
                break
            pages.append(page)
            node = self._nodes[page]
        return pages

    def num_unheld(self, pages: Iterable[int]) -> int:
        """How many of the pages are on the free list: taking them lowers `num_free`."""
        return sum(self._holders[p] == 0 for p in pages)

    def adopt(self, sequence: Sequence, pages: list[int]) -> None:
        """Give a sequence without pages the shared `pages` that `match_prefix` found; its tokens there are computed."""
        assert not sequence.block_table
        for page in pages:
            if self._holders[page] == 0:
                del self._free[page]
            self._holders[page] += 1
        sequence.block_table.extend(pages)
        sequence.num_computed_tokens = len(pages) * self.block_size
        self._chains[sequence] = (len(pages), self._nodes[pages[-1]] if pages else _root(sequence.cache_salt))

    def suffice(self, sequences: Collection[Sequence]) -> bool:
        """Whether every one of these sequences can have the page it may lack for its newest token."""
        if len(sequences) <= len(self._free):
            return True
        size = self.block_size
        return sum(len(s.token_ids) > len(s.block_table) * size for s in sequences) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the sequence's first `num_tokens` tokens; False (and no change) if pages are short."""
        missing = self.pages_for(num_tokens) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._next_page(sequence)
            del self._free[page]
            self._forget(page)
            self._holders[page] = 1
            sequence.block_table.append(page)
        return True

    def _next_page(self, sequence: Sequence) -> int:
        """The page after the sequence's last one where that is free and empty: neighbours are read without copying.

        A first page is looked for at a run long enough for all the sequence may become. Else the page that was unused
        for the longest time.
        """
        if sequence.block_table:
            follower = sequence.block_table[-1] + 1
            if follower in self._free and self._keys[follower] is None:
                return follower
        else:
            start = self._find_run(self.pages_for(sequence.num_prompt_tokens + sequence.params.max_tokens))
            if start is not None:
                return start
        return next(iter(self._free))

    def _find_run(self, length: int) -> int | None:
        """First of `length` pages in a row that are free and empty, searched from where the last search ended."""
        found = 0
        for step in range(min(self.num_blocks, SEARCH_PAGES)):
            page = (self._cursor + step) % self.num_blocks
            found = 0 if page == 0 else found
            found = found + 1 if self._holders[page] == 0 and self._keys[page] is None else 0
            if found == length:
                self._cursor = page + 1
                return page - length + 1
        return None

    def commit(self, sequence: Sequence) -> None:
        """Enter the pages that are now full into the prefix tree."""
        if not self.prefix_caching:
            return
        entered, node = self._chains.get(sequence, (0, _root(sequence.cache_salt)))
        size = self.block_size
        while (entered + 1) * size <= sequence.num_computed_tokens:
            key = (node, tuple(sequence.token_ids[entered * size : (entered + 1) * size]))
            page = self._index.get(key)
            if page is None:  # else another sequence computed the same: its page stays the known one
                page = sequence.block_table[entered]
                self._index[key] = page
                self._keys[page] = key
                self._nodes[page] = self._next_node
                self._next_node += 1
            node = self._nodes[page]
            entered += 1
        self._chains[sequence] = (entered, node)

    def release(self, sequence: Sequence) -> None:
        """Take all pages back. What can be shared later goes to the back of the free list, its end first."""
        self._chains.pop(sequence, None)
        for page in reversed(sequence.block_table):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if self._keys[page] is None:
                    self._free.move_to_end(page, last=False)
        sequence.block_table = []  # another list, by which a reader of the old one sees that it is not the same table

    def check(self, live: Iterable[Sequence]) -> None:
        """Raises AssertionError unless the books agree with what the live sequences hold."""
        held = [0] * self.num_blocks
        for sequence in live:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a page twice in one table"
            assert sequence.num_computed_tokens <= len(sequence.block_table) * self.block_size, "tokens without a page"
            for page in sequence.block_table:
                held[page] += 1
        assert held == self._holders, "holders miscounted"
        assert set(self._free) == {p for p, n in enumerate(held) if n == 0}, "free list wrong"
        for key, page in self._index.items():
            assert self._keys[page] == key, "prefix index points at a page with other content"
        assert sum(k is not None for k in self._keys) == len(self._index), "a key outside the index"

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._index[key]
            self._keys[page] = None


def _root(salt: str | None) -> Node:
    return ROOT if salt is None else salt
