"""Which tokens run in the next step: every decode, then prefill chunks, then guesses, under one token budget.

Plain Python over `Sequence`: no tensors, no clock of its own, no thread. Called by one thread only.

Who is admitted, `server.scheduler.queue` says. Where pages run out, the least urgent gives its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from server.core import FinishReason, SampledToken, ScheduledBatch, Sequence, StepOutput, Work
from server.scheduler.blocks import BlockManager
from server.scheduler.flight import Step, StepsInFlight
from server.scheduler.ngram import NgramDrafter
from server.scheduler.queue import WaitingQueue

SPEED_MEMORY = 0.05  # weight of the newest finished sequence in the running mean of service times


class Scheduler:
    """`schedule` -> run -> `commit`, with `add` and `end` in between.

    A second `schedule` before the `commit` of the first runs ahead of its tokens; then steps are committed in order.
    """

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
        self.drafter = drafter
        self.flight = StepsInFlight()
        self.queue = WaitingQueue(blocks, max_num_seqs=max_num_seqs, admission_reserve=admission_reserve)
        self.running: dict[Sequence, Work] = {}  # in order of admission; with the work of a decode, for every step
        self.num_preemptions = 0
        self.service_s = 1.0  # running mean of a sequence's time from admission to end

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `never_fits`."""
        params = sequence.params
        sequence.max_len = min(sequence.num_prompt_tokens + params.max_tokens, self.max_model_len)
        sequence.end_ids = params.eos_token_ids | params.stop_token_ids
        self.queue.add(sequence)

    def never_fits(self, num_tokens: int) -> bool:
        """True if a sequence of so many tokens could not run even alone."""
        return num_tokens > self.max_model_len or self.blocks.pages_for(num_tokens) > self.blocks.num_blocks

    def live(self) -> Iterator[Sequence]:
        """Every sequence that has not ended."""
        yield from self.running
        yield from self.queue.waiting

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Drop a live sequence and free its pages: at once, or when the steps in flight have landed."""
        if self.running.pop(sequence, None) is None:
            self.queue.leave(sequence)
        if not self.flight.drop(sequence):
            self.blocks.release(sequence)
        if self.drafter is not None:
            self.drafter.forget(sequence)
        self.queue.note_room()
        sequence.finish_reason = reason

    def clear(self) -> list[Sequence]:
        """Forget everything after a step that failed; returns the sequences that were live."""
        live = list(self.live())
        for sequence in (*live, *self.flight.leaving()):
            self.blocks.release(sequence)
        self.running.clear()
        self.queue.waiting.clear()
        self.flight.clear()
        return live

    def schedule(self, now_s: float) -> ScheduledBatch | None:
        """The next step's work. None when there is nothing to run, or nothing until the step in flight is committed."""
        if self.flight and not self._may_run_ahead():
            return None
        decodes, prefills, preempted = self._schedule_decodes()
        budget = self.max_batch_tokens - len(decodes)
        chunks: list[Work] = []
        for sequence in prefills:
            if budget:
                budget -= self._add_chunk(chunks, sequence, budget)
        if budget and not preempted:
            for admitted in self.queue.admissions(self.running):
                self.running[admitted] = Work(admitted, 1, samples=True)
                if admitted.params.needs_host:
                    self.flight.bound.add(admitted)
                if admitted.timings.scheduled_s is None:
                    admitted.timings.scheduled_s = now_s
                budget -= self._add_chunk(chunks, admitted, budget)
                if not budget:
                    break
        guessing: list[Work] = []
        if self.drafter is not None and budget:
            places = max(self.max_num_seqs, 1 + self.drafter.max_tokens) - len(decodes) - len(chunks)
            decodes, guessing = self._add_drafts(self.drafter, decodes, min(budget, places))
        work = (*decodes, *guessing, *chunks)
        return self.flight.depart(ScheduledBatch(work, len(decodes))) if work else None

    def commit(self, batch: ScheduledBatch, sampled: SequenceOf[SampledToken], now_s: float) -> list[StepOutput]:
        """Book what a step computed. `sampled` follows the batch's sampling work and its guesses in order.

        An id below 0, of a step that another one was scheduled behind, has to be drawn again.
        """
        step = self.flight.land(batch)
        outputs: list[StepOutput] = []
        drawn = iter(sampled)
        page, assumed, dropped = self.blocks.block_size, step.assumed, step.dropped
        for work, token in zip(batch.work[: batch.num_decodes], drawn):  # noqa: B905 - the drawn ones go on
            sequence = work.sequence
            if dropped and sequence in dropped:
                continue
            ids, token_id = sequence.token_ids, token.token_id
            if assumed:
                if token_id < 0:
                    self.flight.rerun(sequence)
                    continue
                computed = len(ids) - 1
                ids[-1] = token_id
            else:
                sequence.num_computed_tokens = computed = len(ids)
                ids.append(token_id)
            if not computed % page:  # a page became full
                self.blocks.commit(sequence)
            reason = None
            if token_id in sequence.end_ids or computed + 1 >= sequence.max_len:
                reason = self._finish(sequence, token_id, now_s)
            outputs.append(StepOutput(sequence.request_id, token_id, token.logprobs, reason))
        for work in batch.work[batch.num_decodes :]:
            rows = [next(drawn) for _ in range(work.samples + len(work.draft_ids))]
            if work.sequence not in dropped:
                book = self._commit_drafts if work.draft_ids else self._commit_chunk
                outputs += book(work, step, rows, now_s)
        for sequence in step.leaving():
            self.blocks.release(sequence)
            self.queue.note_room()
        return outputs

    def _commit_chunk(self, work: Work, step: Step, rows: list[SampledToken], now_s: float) -> list[StepOutput]:
        """Book a piece of a prompt, and the token drawn behind its end."""
        sequence = work.sequence
        if not step.assumed:
            sequence.num_computed_tokens += work.num_tokens
        elif rows and rows[0].token_id < 0:
            self.flight.rerun(sequence)
            return []
        elif rows:
            sequence.token_ids.pop()
        self.blocks.commit(sequence)
        if not rows:
            if sequence.params.max_tokens > 0 or sequence.num_pending_tokens:
                return []
            return [StepOutput(sequence.request_id, None, None, self._finish(sequence, None, now_s))]
        [token] = rows
        sequence.token_ids.append(token.token_id)
        if sequence.timings.first_token_s is None:
            sequence.timings.first_token_s = now_s
        reason = self._finish(sequence, token.token_id, now_s)
        return [StepOutput(sequence.request_id, token.token_id, token.logprobs, reason)]

    def _commit_drafts(self, work: Work, step: Step, rows: list[SampledToken], now_s: float) -> list[StepOutput]:
        """Book what was drawn, up to the first guess that was wrong. A right one is computed: its place is filled."""
        assert not step.assumed, "nothing is scheduled ahead of guesses"
        sequence = work.sequence
        outputs: list[StepOutput] = []
        for token, guess in zip(rows, (*work.draft_ids, None), strict=True):
            sequence.num_computed_tokens += 1
            sequence.token_ids.append(token.token_id)
            outputs.append(StepOutput(sequence.request_id, token.token_id, token.logprobs))
            if token.token_id != guess or self._ends(sequence, token.token_id):
                break
        self.blocks.commit(sequence)
        if self.drafter is not None:
            self.drafter.note(sequence, len(work.draft_ids), len(outputs) - 1)
        outputs[-1].finish_reason = self._finish(sequence, sequence.token_ids[-1], now_s)
        return outputs

    def check(self) -> None:
        """Raises AssertionError unless every book agrees: pages, queues, counts."""
        self.blocks.check([*self.live(), *self.flight.leaving()])
        assert self.flight.bound <= self.running.keys(), "a sequence that does not run keeps others in plain order"
        assert len(self.running) <= self.max_num_seqs
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.queue.waiting), (
            "a waiting one holds pages"
        )
        assert all(s.finish_reason is None and s.num_pending_tokens > 0 for s in self.live()), "a dead one is live"

    def _may_run_ahead(self) -> bool:
        """Whether a step may be scheduled before the one in flight is committed: the one place that says so.

        Not where guesses or a draw need tokens that the host does not know, nor where a sequence would be preempted.
        """
        if self.drafter is not None or self.flight.bound:
            return False
        self.flight.assume()
        return self.blocks.suffice(self.running)

    def _schedule_decodes(self) -> tuple[list[Work], list[Sequence], bool]:
        """Work of the decoding sequences, the sequences that still prefill, and whether one had to be preempted."""
        decodes: list[Work] = []
        prefills: list[Sequence] = []
        page, preempted, ahead = self.blocks.block_size, False, bool(self.flight)
        for work in tuple(self.running.values()):
            sequence = work.sequence
            length = len(sequence.token_ids)
            if preempted and sequence not in self.running:
                continue
            pending = length - sequence.num_computed_tokens
            if pending != 1 or length == sequence.num_prompt_tokens:
                if pending:  # else the last piece of a prompt to score is in flight
                    prefills.append(sequence)
                continue
            if ahead and length >= sequence.max_len:  # its last token is being drawn
                continue
            if length > len(sequence.block_table) * page:
                num_preemptions = self.num_preemptions
                fits = self._make_room(sequence, length)
                preempted |= self.num_preemptions > num_preemptions
                if not fits:
                    continue  # it was itself the one with the least to lose
            decodes.append(work)
        if preempted:
            decodes = [work for work in decodes if work.sequence in self.running]
            prefills = [sequence for sequence in prefills if sequence in self.running]
        return decodes, prefills, preempted

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens`, at the cost of the least urgent, of these the last admitted. False: of itself."""
        while not self.blocks.grow(sequence, num_tokens):
            victim = max(reversed(self.running), key=lambda running: running.priority)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _add_drafts(self, drafter: NgramDrafter, decodes: list[Work], places: int) -> tuple[list[Work], list[Work]]:
        """Decodes without and with guesses behind them: where there are any, and rows and free pages for them."""
        plain: list[Work] = []
        guessing: list[Work] = []
        for work in decodes:
            sequence = work.sequence
            length = len(sequence.token_ids)
            room = min(places, sequence.max_len - length - 1)
            guess = drafter.draft(sequence, room) if room > 0 else []
            if guess and self.blocks.grow(sequence, length + len(guess)):
                places -= len(guess)
                guessing.append(Work(sequence, 1 + len(guess), True, guess))
            else:
                plain.append(work)
        return plain, guessing

    def _add_chunk(self, chunks: list[Work], sequence: Sequence, budget: int) -> int:
        num_tokens = min(sequence.num_pending_tokens, budget)
        last = num_tokens == sequence.num_pending_tokens
        chunks.append(Work(sequence, num_tokens, samples=last and sequence.params.max_tokens > 0))
        return num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        """Free its pages; it is recomputed, prompt and output, when there is room again."""
        assert not self.flight, "a step in flight may write to its pages"
        del self.running[sequence]
        self.flight.bound.discard(sequence)
        self.blocks.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.queue.add_first(sequence)

    def _ends(self, sequence: Sequence, token_id: int | None) -> bool:
        """Whether a sequence is complete with its newest token."""
        return token_id in sequence.end_ids or len(sequence.token_ids) >= sequence.max_len

    def _finish(self, sequence: Sequence, token_id: int | None, now_s: float) -> FinishReason | None:
        """End a sequence that is complete with its newest token, and say why."""
        if not self._ends(sequence, token_id):
            return None
        reason = FinishReason.STOP if token_id in sequence.end_ids else FinishReason.LENGTH
        timings = sequence.timings
        timings.finished_s = now_s
        if timings.scheduled_s is not None:
            self.service_s += SPEED_MEMORY * (now_s - timings.scheduled_s - self.service_s)
        self.end(sequence, reason)
        return reason
