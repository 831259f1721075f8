"""What runs when: decodes first, one chunk of delay at most, no thrashing, no starving. A fake runner draws tokens."""

from __future__ import annotations

import random

import pytest

from server.core import FinishReason, SampledToken, SamplingParams, ScheduledBatch, Sequence, Timings
from server.scheduler.blocks import BlockManager
from server.scheduler.queue import MAX_BYPASS
from server.scheduler.scheduler import Scheduler


def make(num_blocks: int = 64, *, budget: int = 32, seqs: int = 8, reserve: float = 1.0, limit: int = 512) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=seqs,
        max_batch_tokens=budget,
        max_model_len=limit,
        admission_reserve=reserve,
    )


def sequence(name: str, prompt: int, max_tokens: int = 8, **params: object) -> Sequence:
    ids = [hash((name, i)) % 1000 + 10 for i in range(prompt)]
    return Sequence(name, ids, prompt, SamplingParams(max_tokens=max_tokens, **params), Timings(0.0))  # type: ignore[arg-type]


def step(scheduler: Scheduler, token: int = 5) -> ScheduledBatch | None:
    batch = scheduler.schedule(0.0)
    if batch is not None:
        drawn = [SampledToken(token) for w in batch.work if w.samples]
        scheduler.commit(batch, drawn, 0.0)
    scheduler.check()
    return batch


def test_a_decode_never_waits_behind_a_long_prompt() -> None:
    scheduler = make(budget=16)
    short, long = sequence("short", 4, 20), sequence("long", 150, 2)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(long)
    while short.finish_reason is None:
        before = short.num_output_tokens
        batch = step(scheduler)
        assert batch is not None and batch.num_tokens <= 16
        assert batch.work[0].sequence is short and short.num_output_tokens == before + 1


def test_decodes_stand_before_chunks_and_the_budget_holds() -> None:
    scheduler = make(budget=24)
    for i in range(4):
        scheduler.add(sequence(f"s{i}", 30, 6))
    while (batch := step(scheduler)) is not None:
        sizes = [w.num_tokens for w in batch.work]
        assert batch.num_tokens <= 24
        first_chunk = next((i for i, n in enumerate(sizes) if n > 1), len(sizes))
        assert all(n == 1 for n in sizes[:first_chunk])


def test_full_reservation_never_preempts_and_ends_with_all_pages_free() -> None:
    scheduler = make(24, reserve=1.0)
    rng = random.Random(0)
    for i in range(60):
        scheduler.add(sequence(f"s{i}", rng.randrange(1, 30), rng.randrange(1, 40)))
    while step(scheduler) is not None:
        pass
    assert scheduler.num_preemptions == 0
    assert scheduler.blocks.num_free == 24


def test_without_reservation_preempted_sequences_still_finish() -> None:
    scheduler = make(12, reserve=0.0)
    sequences = [sequence(f"s{i}", 7, 24) for i in range(12)]
    for item in sequences:
        scheduler.add(item)
    while step(scheduler) is not None:
        pass
    assert scheduler.num_preemptions > 0
    assert all(s.num_output_tokens == 24 and s.finish_reason is FinishReason.LENGTH for s in sequences)
    assert scheduler.blocks.num_free == 12


def test_a_large_head_is_overtaken_only_so_often() -> None:
    scheduler = make(16, reserve=1.0, seqs=20, budget=64)
    scheduler.add(sequence("runs", 8, 40))
    step(scheduler)
    large = sequence("large", 30, 10)  # 10 pages; 4 are free beyond what `runs` may still need
    scheduler.add(large)
    for i in range(MAX_BYPASS + 6):
        scheduler.add(sequence(f"small{i}", 2, 1))
    overtaken = 0
    while large.timings.scheduled_s is None:
        batch = step(scheduler)
        assert batch is not None, "the queue stands still"
        if large.timings.scheduled_s is None:
            overtaken += sum(w.sequence.request_id.startswith("small") for w in batch.work)
    assert overtaken == MAX_BYPASS


def test_stop_tokens_end_a_sequence_and_abort_frees_at_once() -> None:
    scheduler = make()
    stopped = sequence("stop", 5, 50, stop_token_ids=frozenset({5}))
    eos = sequence("eos", 5, 50, eos_token_ids=frozenset({5}))
    endless = sequence("endless", 5, 50)
    for item in (stopped, eos, endless):
        scheduler.add(item)
    step(scheduler)
    assert stopped.finish_reason is FinishReason.STOP and eos.finish_reason is FinishReason.STOP
    scheduler.end(endless, FinishReason.ABORT)
    scheduler.check()
    assert scheduler.blocks.num_free == 64 and not list(scheduler.live())


def test_a_prompt_to_score_ends_without_a_token() -> None:
    scheduler = make(budget=16)
    scored = sequence("score", 33, 0)  # the last chunk is a single token
    scheduler.add(scored)
    while step(scheduler) is not None:
        pass
    assert scored.finish_reason is FinishReason.LENGTH and scored.num_output_tokens == 0


def test_the_context_limit_ends_a_sequence() -> None:
    scheduler = make(limit=12)
    item = sequence("s", 10, 100)
    scheduler.add(item)
    while step(scheduler) is not None:
        pass
    assert len(item.token_ids) == 12 and item.finish_reason is FinishReason.LENGTH


def test_the_second_of_two_equal_prompts_takes_its_pages_from_the_first() -> None:
    scheduler = make()
    first, second = sequence("same", 21), sequence("same", 21)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    step(scheduler)
    assert second.num_cached_tokens == 20 and scheduler.queue.prefix_hits == 20 and scheduler.queue.prefix_queries == 42


def test_a_budget_without_room_for_prefill_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens 8 must exceed max_num_seqs 8"):
        make(budget=8)
