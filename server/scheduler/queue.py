"""Who waits, and who of them is admitted: by priority, then arrival, while there are pages for what all will generate.

Not the running ones (`server.scheduler.scheduler`). Admission keeps pages free for what running sequences will still
generate, so preemption is the last resort and not the normal course. A request that does not fit may be overtaken, but
only `MAX_BYPASS` times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator

from server.core import Sequence
from server.scheduler.blocks import BlockManager

MAX_BYPASS = 8  # times the head of the queue may be overtaken; also how far the queue is searched


class WaitingQueue:
    """The waiting sequences. They hold no pages; one that leaves has pages for all its known tokens."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, admission_reserve: float) -> None:
        self.waiting: deque[Sequence] = deque()
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._admission_reserve = admission_reserve
        self._bypassed = 0
        self._stuck = False  # nobody waiting fits, and nothing has changed since

    def add(self, sequence: Sequence) -> None:
        """A new sequence, behind all of its priority."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > sequence.priority:
            place -= 1
        self.waiting.insert(place, sequence)
        self._stuck = False

    def add_first(self, sequence: Sequence) -> None:
        """A preempted sequence, which goes before all others of its priority."""
        place = 0
        while place < len(self.waiting) and self.waiting[place].priority < sequence.priority:
            place += 1
        self.waiting.insert(place, sequence)
        self._bypassed = 0
        self._stuck = False

    def leave(self, sequence: Sequence, overtaking: bool = False) -> None:
        """Take a sequence out, admitted or dropped."""
        if self.waiting and self.waiting[0] is sequence:
            self.waiting.popleft()
            self._bypassed = 0
            return
        self.waiting.remove(sequence)
        self._bypassed += overtaking

    def note_room(self) -> None:
        """Pages or a place may have become free."""
        self._stuck = False

    def admissions(self, running: Collection[Sequence]) -> Iterator[Sequence]:
        """Admit one sequence after the other while there is room; the caller adds each to `running`."""
        if not self.waiting or self._stuck or len(running) >= self._max_num_seqs:
            return
        reserve = sum(map(self._future_pages, running))
        while len(running) < self._max_num_seqs:
            admitted = self._admit(reserve, alone=not running)
            if admitted is None:
                self._stuck = bool(running)
                return
            yield admitted
            reserve += self._future_pages(admitted)

    def _admit(self, reserve: int, alone: bool) -> Sequence | None:
        """Take out the first sequence that fits, with pages. `reserve` is how many are kept free for the running."""
        reach = 1 + max(0, MAX_BYPASS - self._bypassed)
        for position, sequence in enumerate(self.waiting):
            if position >= reach:
                return None
            ids = [] if sequence.params.reads_prompt else sequence.token_ids
            shared = self._blocks.match_prefix(ids, sequence.cache_salt)
            if not self._fits(sequence, shared, reserve, alone):
                continue
            self.leave(sequence, overtaking=position > 0)
            self._blocks.adopt(sequence, shared)
            grown = self._blocks.grow(sequence, len(sequence.token_ids))
            assert grown
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
                self.prefix_queries += sequence.num_prompt_tokens
                self.prefix_hits += sequence.num_cached_tokens
            return sequence
        return None

    def _fits(self, sequence: Sequence, shared: list[int], reserve: int, alone: bool) -> bool:
        blocks = self._blocks
        pages = blocks.pages_for(len(sequence.token_ids)) - len(shared) + blocks.num_unheld(shared)
        if alone:
            return pages <= blocks.num_free
        return pages + reserve + self._future_pages(sequence) <= blocks.num_free

    def _future_pages(self, sequence: Sequence) -> int:
        """Pages kept free for what a sequence may still generate."""
        length = len(sequence.token_ids)
        rest = math.ceil(self._admission_reserve * max(0, sequence.max_len - length))
        return self._blocks.pages_for(length + rest) - self._blocks.pages_for(length)
