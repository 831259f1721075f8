"""Guesses: what the look-up finds, and that guesses of any kind change nothing but the number of steps."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import SampledToken, SamplingParams, ScheduledBatch, Sequence, StepOutput, Timings
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import SIZES, NgramDrafter
from server.scheduler.scheduler import Scheduler


def sequence(ids: list[int], max_tokens: int = 40, name: str = "s", **params: object) -> Sequence:
    return Sequence(name, list(ids), len(ids), SamplingParams(max_tokens=max_tokens, **params), Timings(0.0))  # type: ignore[arg-type]


def test_what_followed_the_same_tokens_is_guessed() -> None:
    drafter = NgramDrafter(3)
    assert drafter.draft(sequence([1, 2, 3, 4, 5, 6, 1, 2]), 9) == [3, 4, 5]
    assert drafter.draft(sequence([1, 2, 3, 4, 5, 6, 1, 2]), 2) == [3, 4]
    assert drafter.draft(sequence([1, 2, 3, 4]), 9) == []
    assert drafter.draft(sequence([1]), 9) == []


def test_the_longest_match_decides_and_then_the_latest() -> None:
    longer_first = [7, 8, 9, 50, 0, 8, 9, 60, 0, 7, 8, 9]
    assert NgramDrafter(1).draft(sequence(longer_first), 1) == [50]
    latest = [8, 9, 50, 0, 8, 9, 60, 1, 8, 9]
    assert NgramDrafter(1).draft(sequence(latest), 1) == [60]


def test_a_loop_is_guessed_beyond_the_end_of_the_text() -> None:
    assert NgramDrafter(5).draft(sequence([4, 5, 6, 4, 5]), 9) == [6, 4, 5, 6, 4]
    assert NgramDrafter(4).draft(sequence([3, 3, 3]), 9) == [3, 3, 3, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=20))
def test_a_table_that_grew_equals_one_made_at_once(start: list[int], more: list[int]) -> None:
    drafter, item = NgramDrafter(6), sequence(start)
    drafter.draft(item, 6)
    for token in more:
        item.token_ids.append(token)
        drafter.draft(item, 6)
    guess = drafter.draft(item, 6)
    assert guess == NgramDrafter(6).draft(sequence(start + more), 6)
    ids, size = start + more, len(start) + len(more)
    if guess:
        places = [(n, end) for n in SIZES for end in range(n, size) if ids[end - n : end] == ids[size - n :]]
        n = max(n for n, _ in places)
        assert guess[0] == ids[max(end for m, end in places if m == n)]


def test_wrong_guesses_make_the_next_ones_short_and_right_ones_long() -> None:
    drafter, item = NgramDrafter(8), sequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2])
    assert len(drafter.draft(item, 8)) == 8
    lengths = []
    for accepted in (3, 0, 1, 2, 4):
        drafter.note(item, len(drafter.draft(item, 8)), accepted)
        lengths.append(len(drafter.draft(item, 8)))
    assert lengths == [3, 1, 2, 4, 8]
    assert (drafter.num_drafts, drafter.num_draft_tokens, drafter.num_accepted_tokens) == (5, 18, 10)


class AnyGuess(NgramDrafter):
    """Right, wrong or half right, by a coin; keeps what it was asked."""

    def __init__(self, max_tokens: int, seed: int) -> None:
        super().__init__(max_tokens)
        self._random = random.Random(seed)

    def draft(self, sequence: Sequence, max_tokens: int) -> list[int]:
        super().draft(sequence, max_tokens)
        ids, count = list(sequence.token_ids), self._random.randrange(min(max_tokens, self.max_tokens) + 1)
        for _ in range(count):
            ids.append(following(ids) if self._random.random() < 0.7 else 99)
        return ids[len(sequence.token_ids) :]


def following(ids: list[int]) -> int:
    """The model: a function of the whole text."""
    return (sum(ids) * 7 + len(ids) * 3 + ids[-1]) % 90


def run(scheduler: Scheduler, sequences: list[Sequence]) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for item in sequences:
        scheduler.add(item)
    while (batch := scheduler.schedule(0.0)) is not None:
        assert batch.num_tokens <= scheduler.max_batch_tokens
        guessing = [i for i, work in enumerate(batch.work) if work.draft_ids]
        if guessing:
            assert guessing == list(range(guessing[0], guessing[-1] + 1)), "decodes with guesses stand together"
            assert all(work.num_tokens == 1 for work in batch.work[: guessing[0]]), "behind the plain ones"
        outputs += scheduler.commit(batch, draw(batch), 0.0)
        scheduler.check()
        for item in scheduler.running:
            assert len(item.block_table) <= scheduler.blocks.pages_for(
                min(item.num_prompt_tokens + item.params.max_tokens, scheduler.max_model_len)
            ), "pages beyond what the sequence may become"
    return outputs


def draw(batch: ScheduledBatch) -> list[SampledToken]:
    tokens = []
    for work in batch.work:
        ids = work.sequence.token_ids
        if work.samples:
            tokens += [following([*ids, *work.draft_ids[:n]]) for n in range(len(work.draft_ids) + 1)]
    return [SampledToken(token) for token in tokens]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=6),
    max_tokens=st.integers(1, 25),
    stop=st.integers(0, 89),
    num_blocks=st.integers(16, 60),
    max_drafts=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_guesses_of_any_kind_change_no_token(
    prompts: list[list[int]], max_tokens: int, stop: int, num_blocks: int, max_drafts: int, seed: int
) -> None:
    answers = []
    for drafter in (None, AnyGuess(max_drafts, seed)):
        scheduler = Scheduler(
            BlockManager(num_blocks, 4),
            max_num_seqs=4,
            max_batch_tokens=16,
            max_model_len=40,
            admission_reserve=0.0,
            drafter=drafter,
        )
        made = [
            sequence(
                p, max_tokens, str(i), stop_token_ids=frozenset({stop}), eos_token_ids=frozenset({(stop + 1) % 90})
            )
            for i, p in enumerate(prompts)
        ]
        outputs = run(scheduler, made)
        assert scheduler.blocks.num_free == num_blocks
        assert drafter is None or not drafter._texts, "ended sequences are forgotten"
        for item in made:  # what is published is what is kept
            mine = [o for o in outputs if o.request_id == item.request_id]
            assert [o.token_id for o in mine] == item.token_ids[item.num_prompt_tokens :]
            assert [o.finish_reason for o in mine] == [None] * (len(mine) - 1) + [item.finish_reason]
        answers.append([(item.token_ids, item.finish_reason) for item in made])
    assert answers[0] == answers[1]


def test_rejected_tokens_never_enter_the_prefix_tree() -> None:
    blocks = BlockManager(64, 4)
    scheduler = Scheduler(
        blocks, max_num_seqs=4, max_batch_tokens=32, max_model_len=60, admission_reserve=0.0, drafter=AnyGuess(8, 3)
    )
    item = sequence([1, 2, 3], 40)
    run(scheduler, [item])
    pages = blocks.match_prefix([*item.token_ids, 0])
    assert len(pages) == (len(item.token_ids) - 1) // 4, "every page of the answer is known"
    known = {tokens for key in blocks._keys if key is not None for tokens in key[1]}
    assert known <= set(item.token_ids) and 99 not in known
