"""Which tokens run in the next step: every decode, then prefill chunks, under one token budget.

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
    ) -> None:
        if max_batch_tokens <= max_num_seqs:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} must exceed max_num_seqs {max_num_seqs}")
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.admission_reserve = admission_reserve
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found
        self._bypassed = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `never_fits`."""
        self.waiting.append(sequence)

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
        sequence.finish_reason = reason

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """The next step's work, or None when there is nothing to run."""
        decodes, preempted = self._schedule_decodes()
        budget = self.max_batch_tokens - len(decodes)
        chunks: list[Work] = []
        for sequence in self.running:
            if budget and sequence.num_pending_tokens > 1:
                budget -= self._add_chunk(chunks, sequence, budget)
        while budget and not preempted and len(self.running) < self.max_num_seqs:
            admitted = self._admit()
            if admitted is None:
                break
            if admitted.timings.scheduled_s is None:
                admitted.timings.scheduled_s = now_s
            budget -= self._add_chunk(chunks, admitted, budget)
        work = (*decodes, *chunks)
        return ScheduledBatch(work) if work else None

    def commit(self, batch: ScheduledBatch, sampled: SequenceOf[SampledToken], now_s: float) -> list[StepOutput]:
        """Book what a step computed. `sampled` follows the batch's sampling work in order."""
        outputs: list[StepOutput] = []
        drawn = iter(sampled)
        for work in batch.work:
            sequence = work.sequence
            sequence.num_computed_tokens += work.num_tokens
            self.blocks.commit(sequence)
            if not work.samples:
                if sequence.params.max_tokens == 0 and sequence.num_pending_tokens == 0:
                    outputs.append(self._finish(sequence, None, FinishReason.LENGTH, now_s))
                continue
            token = next(drawn)
            sequence.token_ids.append(token.token_id)
            if sequence.timings.first_token_s is None:
                sequence.timings.first_token_s = now_s
            outputs.append(self._finish(sequence, token, self._finish_reason(sequence, token.token_id), now_s))
        return outputs

    def check(self) -> None:
        """Raises AssertionError unless every book agrees: pages, queues, counts."""
        self.blocks.check(self.live())
        assert len(self.running) <= self.max_num_seqs
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting), "a waiting one holds pages"
        assert all(s.finish_reason is None and s.num_pending_tokens > 0 for s in self.live()), "a dead one is live"

    def _schedule_decodes(self) -> tuple[list[Work], bool]:
        decodes: list[Work] = []
        preempted = False
        queue = deque(s for s in self.running if s.num_pending_tokens == 1)
        while queue:
            sequence = queue.popleft()
            while not self.blocks.grow(sequence, len(sequence.token_ids)):
                victim = self.running[-1]  # the last admitted has the least to lose
                if victim in queue:
                    queue.remove(victim)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                decodes.append(Work(sequence, 1, samples=sequence.params.max_tokens > 0))
        return decodes, preempted

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

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence that fits to running, with pages for all its known tokens."""
        reach = 1 + max(0, MAX_BYPASS - self._bypassed)
        for position, sequence in enumerate(self.waiting):
            if position >= reach:
                return None
            shared = [] if sequence.params.prompt_logprobs is not None else self.blocks.match_prefix(sequence.token_ids)
            if not self._fits(sequence, shared):
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

    def _fits(self, sequence: Sequence, shared: list[int]) -> bool:
        pages = self.blocks.pages_for(len(sequence.token_ids)) - len(shared) + self.blocks.num_unheld(shared)
        if not self.running:
            return pages <= self.blocks.num_free
        reserve = self._future_pages(sequence) + sum(self._future_pages(s) for s in self.running)
        return pages + reserve <= self.blocks.num_free

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

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.params
        if token_id in params.eos_token_ids or token_id in params.stop_token_ids:
            return FinishReason.STOP
        if sequence.num_output_tokens >= params.max_tokens or len(sequence.token_ids) >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(
        self, sequence: Sequence, token: SampledToken | None, reason: FinishReason | None, now_s: float
    ) -> StepOutput:
        if reason is not None:
            sequence.timings.finished_s = now_s
            self.end(sequence, reason)
        return StepOutput(
            sequence.request_id,
            None if token is None else token.token_id,
            None if token is None else token.logprobs,
            reason,
        )
