"""Which tokens run in the next step: every decode, then prefill chunks, then guesses, under one token budget.

Plain Python over `Sequence`: no tensors, no clock of its own, no thread. Called by one thread only.

Admission keeps pages free for what running sequences will still generate, so preemption is the last resort and not
the normal course. A request that does not fit may be overtaken, but only `MAX_BYPASS` times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from server.core import FinishReason, SampledToken, ScheduledBatch, Sequence, StepOutput, Work
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import NgramDrafter

SPEED_MEMORY = 0.05  # weight of the newest finished sequence in the running mean of service times
MAX_BYPASS = 8  # times the head of the queue may be overtaken; also how far the queue is searched


class Scheduler:
    """`schedule` -> run -> `commit`, with `add` and `abort` between steps."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        admission_reserve: float,
        drafter: NgramDrafter | None = None,
    ) -> None:
        if max_batch_tokens <= max_num_seqs:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} must exceed max_num_seqs {max_num_seqs}")
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.admission_reserve = admission_reserve
        self.drafter = drafter
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found
        self.service_s = 1.0  # running mean of a sequence's time from admission to end
        self._bypassed = 0
        self._stuck = False  # nobody waiting fits, and nothing has changed since

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `never_fits`."""
        self.waiting.append(sequence)
        self._stuck = False

    def never_fits(self, num_tokens: int) -> bool:
        """True if a sequence of so many tokens could not run even alone."""
        return num_tokens > self.max_model_len or self.blocks.pages_for(num_tokens) > self.blocks.num_blocks

    def live(self) -> Iterator[Sequence]:
        """Every sequence that has not ended."""
        yield from self.running
        yield from self.waiting

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Drop a live sequence and free its pages at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._leave_queue(sequence)
        self.blocks.release(sequence)
        if self.drafter is not None:
            self.drafter.forget(sequence)
        self._stuck = False
        sequence.finish_reason = reason

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """The next step's work, or None when there is nothing to run."""
        decodes, prefills, preempted = self._schedule_decodes()
        budget = self.max_batch_tokens - len(decodes)
        chunks: list[Work] = []
        for sequence in prefills:
            if budget:
                budget -= self._add_chunk(chunks, sequence, budget)
        may_admit = not preempted and not self._stuck and len(self.running) < self.max_num_seqs
        if self.waiting and budget and may_admit:
            for admitted in self._admissions():
                if admitted.timings.scheduled_s is None:
                    admitted.timings.scheduled_s = now_s
                budget -= self._add_chunk(chunks, admitted, budget)
                if not budget:
                    break
        if self.drafter is not None and budget:
            places = max(self.max_num_seqs, 1 + self.drafter.max_tokens) - len(decodes) - len(chunks)
            decodes = self._add_drafts(self.drafter, decodes, min(budget, places))
        work = (*decodes, *chunks)
        return ScheduledBatch(work) if work else None

    def commit(self, batch: ScheduledBatch, sampled: SequenceOf[SampledToken], now_s: float) -> list[StepOutput]:
        """Book what a step computed. `sampled` follows the batch's sampling work and its guesses in order."""
        outputs: list[StepOutput] = []
        drawn = iter(sampled)
        page = self.blocks.block_size
        for work in batch.work:
            sequence = work.sequence
            if work.draft_ids:
                rows = [next(drawn) for _ in range(work.num_tokens)]
                outputs += self._commit_drafts(sequence, work.draft_ids, rows, now_s)
                continue
            sequence.num_computed_tokens = computed = sequence.num_computed_tokens + work.num_tokens
            if computed % page < work.num_tokens:  # a page became full
                self.blocks.commit(sequence)
            if not work.samples:
                if sequence.params.max_tokens == 0 and sequence.num_pending_tokens == 0:
                    self._finish(sequence, FinishReason.LENGTH, now_s)
                    outputs.append(StepOutput(sequence.request_id, None, None, FinishReason.LENGTH))
                continue
            token = next(drawn)
            sequence.token_ids.append(token.token_id)
            if sequence.timings.first_token_s is None:
                sequence.timings.first_token_s = now_s
            reason = self._finish_reason(sequence, token.token_id, computed + 1)
            if reason is not None:
                self._finish(sequence, reason, now_s)
            outputs.append(StepOutput(sequence.request_id, token.token_id, token.logprobs, reason))
        return outputs

    def _commit_drafts(
        self, sequence: Sequence, draft_ids: SequenceOf[int], rows: list[SampledToken], now_s: float
    ) -> list[StepOutput]:
        """Book what was drawn, up to the first guess that was wrong. A right one is computed: its place is filled."""
        outputs: list[StepOutput] = []
        reason = None
        for token, guess in zip(rows, (*draft_ids, None), strict=True):
            sequence.num_computed_tokens += 1
            sequence.token_ids.append(token.token_id)
            reason = self._finish_reason(sequence, token.token_id, len(sequence.token_ids))
            outputs.append(StepOutput(sequence.request_id, token.token_id, token.logprobs, reason))
            if reason is not None or token.token_id != guess:
                break
        self.blocks.commit(sequence)
        if self.drafter is not None:
            self.drafter.note(sequence, len(draft_ids), len(outputs) - 1)
        if reason is not None:
            self._finish(sequence, reason, now_s)
        return outputs

    def check(self) -> None:
        """Raises AssertionError unless every book agrees: pages, queues, counts."""
        self.blocks.check(self.live())
        assert len(self.running) <= self.max_num_seqs
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting), "a waiting one holds pages"
        assert all(s.finish_reason is None and s.num_pending_tokens > 0 for s in self.live()), "a dead one is live"

    def _schedule_decodes(self) -> tuple[list[Work], list[Sequence], bool]:
        """Work of the decoding sequences, the sequences that still prefill, and whether one had to be preempted."""
        decodes: list[Work] = []
        prefills: list[Sequence] = []
        page = self.blocks.block_size
        num_preemptions = self.num_preemptions
        for sequence in self.running:  # victims leave at its end, behind the one in hand: the iteration stays sound
            length = len(sequence.token_ids)
            if length - sequence.num_computed_tokens > 1:
                prefills.append(sequence)
                continue
            if length > len(sequence.block_table) * page and not self._make_room(sequence, length):
                break  # it was itself the last one, and is preempted
            decodes.append(Work(sequence, 1, sequence.params.max_tokens > 0))
        return decodes, prefills, self.num_preemptions > num_preemptions

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens`, at the cost of the last admitted, which has the least to lose. False: of itself."""
        while not self.blocks.grow(sequence, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _add_drafts(self, drafter: NgramDrafter, decodes: list[Work], num_places: int) -> list[Work]:
        """Decodes with guesses behind them, where there are any, and rows and free pages for them."""
        plain: list[Work] = []
        guessing: list[Work] = []
        for work in decodes:
            sequence = work.sequence
            length = len(sequence.token_ids)
            end = min(sequence.num_prompt_tokens + sequence.params.max_tokens, self.max_model_len)
            room = min(num_places, end - length - 1)
            guess = drafter.draft(sequence, room) if room > 0 else []
            if guess and self.blocks.grow(sequence, length + len(guess)):
                num_places -= len(guess)
                guessing.append(Work(sequence, 1 + len(guess), True, guess))
            else:
                plain.append(work)
        return plain + guessing

    def _add_chunk(self, chunks: list[Work], sequence: Sequence, budget: int) -> int:
        num_tokens = min(sequence.num_pending_tokens, budget)
        last = num_tokens == sequence.num_pending_tokens
        chunks.append(Work(sequence, num_tokens, samples=last and sequence.params.max_tokens > 0))
        return num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        """Free its pages; it is recomputed, prompt and output, when there is room again."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self._bypassed = 0
        self._stuck = False

    def _admissions(self) -> Iterator[Sequence]:
        """Admit one sequence after the other while there is room."""
        reserve = sum(map(self._future_pages, self.running))
        while len(self.running) < self.max_num_seqs:
            admitted = self._admit(reserve)
            if admitted is None:
                self._stuck = bool(self.running)
                return
            yield admitted
            reserve += self._future_pages(admitted)

    def _admit(self, reserve: int) -> Sequence | None:
        """Move the first waiting sequence that fits to running, with pages for all its known tokens.

        `reserve` is how many pages are kept free for the running ones.
        """
        reach = 1 + max(0, MAX_BYPASS - self._bypassed)
        for position, sequence in enumerate(self.waiting):
            if position >= reach:
                return None
            shared = [] if sequence.params.prompt_logprobs is not None else self.blocks.match_prefix(sequence.token_ids)
            if not self._fits(sequence, shared, reserve):
                continue
            self._leave_queue(sequence, overtaking=position > 0)
            self.blocks.adopt(sequence, shared)
            grown = self.blocks.grow(sequence, len(sequence.token_ids))
            assert grown
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
                self.prefix_queries += sequence.num_prompt_tokens
                self.prefix_hits += sequence.num_cached_tokens
            self.running.append(sequence)
            return sequence
        return None

    def _fits(self, sequence: Sequence, shared: list[int], reserve: int) -> bool:
        pages = self.blocks.pages_for(len(sequence.token_ids)) - len(shared) + self.blocks.num_unheld(shared)
        if not self.running:
            return pages <= self.blocks.num_free
        return pages + reserve + self._future_pages(sequence) <= self.blocks.num_free

    def _future_pages(self, sequence: Sequence) -> int:
        """Pages kept free for what a sequence may still generate."""
        limit = min(sequence.num_prompt_tokens + sequence.params.max_tokens, self.max_model_len)
        rest = math.ceil(self.admission_reserve * max(0, limit - len(sequence.token_ids)))
        return self.blocks.pages_for(len(sequence.token_ids) + rest) - self.blocks.pages_for(len(sequence.token_ids))

    def _leave_queue(self, sequence: Sequence, overtaking: bool = False) -> None:
        if self.waiting and self.waiting[0] is sequence:
            self.waiting.popleft()
            self._bypassed = 0
            return
        self.waiting.remove(sequence)
        self._bypassed += overtaking

    def _finish_reason(self, sequence: Sequence, token_id: int, length: int) -> FinishReason | None:
        """Why a sequence of `length` tokens ends with its newest, if it does."""
        params = sequence.params
        if token_id in params.eos_token_ids or token_id in params.stop_token_ids:
            return FinishReason.STOP
        if length >= self.max_model_len or length - sequence.num_prompt_tokens >= params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason, now_s: float) -> None:
        timings = sequence.timings
        timings.finished_s = now_s
        if timings.scheduled_s is not None:
            self.service_s += SPEED_MEMORY * (now_s - timings.scheduled_s - self.service_s)
        self.end(sequence, reason)
