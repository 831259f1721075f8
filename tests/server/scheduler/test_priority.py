"""Priorities: who is admitted first, and who gives its pages back; equal ones in the order of arrival."""

from __future__ import annotations

import random

from server.core import SampledToken, SamplingParams, Sequence, Timings
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler


def make(num_blocks: int, *, seqs: int, reserve: float = 1.0) -> Scheduler:
    blocks = BlockManager(num_blocks, 4, prefix_caching=False)
    return Scheduler(blocks, max_num_seqs=seqs, max_batch_tokens=64, max_model_len=512, admission_reserve=reserve)


def sequence(name: str, priority: int, prompt: int = 4, max_tokens: int = 4) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(name, [7] * prompt, prompt, params, Timings(0.0), priority=priority)


def step(scheduler: Scheduler) -> list[str]:
    """One step; the names of those that ended."""
    batch = scheduler.schedule(0.0)
    assert batch is not None
    outputs = scheduler.commit(batch, [SampledToken(5) for w in batch.work if w.samples], 0.0)
    scheduler.check()
    return [output.request_id for output in outputs if output.finish_reason is not None]


def finish_all(scheduler: Scheduler) -> list[str]:
    ended: list[str] = []
    while list(scheduler.live()):
        ended += step(scheduler)
    return ended


def test_the_urgent_go_first_and_equals_as_they_came() -> None:
    scheduler = make(64, seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1), ("f", 5)):
        scheduler.add(sequence(name, priority))
    assert finish_all(scheduler) == ["c", "e", "a", "d", "b", "f"]


def test_the_least_urgent_gives_its_pages_back_also_when_admitted_first() -> None:
    scheduler = make(6, seqs=4, reserve=0.0)
    lazy, urgent = sequence("lazy", 1, 8, 12), sequence("urgent", 0, 8, 12)
    for item in (lazy, urgent):
        scheduler.add(item)
        step(scheduler)
    assert finish_all(scheduler) == ["urgent", "lazy"]
    assert (lazy.num_preemptions > 0, urgent.num_preemptions) == (True, 0)
    assert (lazy.num_output_tokens, urgent.num_output_tokens) == (12, 12)


def test_a_preempted_one_waits_behind_the_more_urgent() -> None:
    scheduler = make(6, seqs=4, reserve=0.0)
    lazy = sequence("lazy", 1, 8, 12)
    scheduler.add(lazy)
    step(scheduler)
    for name in ("u", "v"):
        scheduler.add(sequence(name, 0, 8, 12))
    assert finish_all(scheduler) == ["u", "v", "lazy"]


def test_every_book_agrees_under_random_priorities() -> None:
    rng = random.Random(3)
    scheduler = make(14, seqs=6, reserve=0.0)
    items = [sequence(f"s{i}", rng.randrange(-2, 3), rng.randrange(1, 20), rng.randrange(1, 30)) for i in range(60)]
    waiting = list(items)
    while waiting or list(scheduler.live()):
        for _ in range(min(rng.randrange(3), len(waiting))):
            scheduler.add(waiting.pop())
        if list(scheduler.live()):
            step(scheduler)
    assert scheduler.num_preemptions > 10
    assert all(len(item.token_ids) == item.max_len for item in items)
    assert scheduler.blocks.num_free == 14
