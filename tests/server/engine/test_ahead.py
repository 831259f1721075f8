"""Running ahead: the next step is launched before the tokens of the last are known, and nobody can tell by the answers.

Here on a device made up of its memory alone, which knows what every answer has to be; `test_ahead_runner.py` has the
real runner.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from harness import drive

from server.core import (
    FinishReason,
    SampledToken,
    SamplingParams,
    ScheduledBatch,
    Sequence,
    StepOutput,
    StepTimes,
    Timings,
)
from server.engine.loop import EngineLoop
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import NgramDrafter
from server.scheduler.scheduler import Scheduler

VOCAB = 50
SIZE = 4


def next_token(context: list[int]) -> int:
    """What the made up model says after some tokens."""
    return hash(tuple(context)) % VOCAB


class Memory:
    """A device that is its memory: a place holds the token stored there, and a token follows from all places read.

    It takes its orders at the launch and carries them out when the result is asked for. Where another step was launched
    meanwhile, some draws fail, as those do whose candidates do not suffice.
    """

    runs_ahead = True

    def __init__(self, num_blocks: int, failing: float = 0.0) -> None:
        self.places = [-1] * (num_blocks * SIZE)
        self.failing = failing
        self.launched = 0
        self.ahead = 0  # pieces launched with a token that was not known
        self.failed = 0
        self._rng = random.Random(1)
        self._drawn: list[int] = []

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> Orders:
        """Keep what to run, and where."""
        self.launched += 1
        orders = Orders(self, self.launched)
        for work in batch.work:
            begin = work.sequence.num_computed_tokens
            table = list(work.sequence.block_table)
            orders.pieces.append((begin, work.token_ids, table, work.samples))
            self.ahead += any(t < 0 for t in work.token_ids)
            if work.samples:
                assert begin + work.num_tokens == len(work.sequence.token_ids)
        return orders

    def compute(self, orders: Orders) -> list[int]:
        """Carry out a step."""
        drawn = []
        for begin, ids, table, samples in orders.pieces:
            known = [self._drawn[-1 - t] if t < 0 else t for t in ids]
            slots = [table[p // SIZE] * SIZE + p % SIZE for p in range(begin + len(ids))]
            for slot, token in zip(slots[begin:], known, strict=True):
                self.places[slot] = token
            if samples:
                drawn.append(next_token([self.places[slot] for slot in slots]))
        self._drawn = drawn
        return drawn


class Orders:
    """A step of `Memory`."""

    def __init__(self, memory: Memory, number: int) -> None:
        self.memory = memory
        self.number = number
        self.pieces: list[tuple[int, list[int], list[int], bool]] = []

    def result(self) -> list[SampledToken]:
        """The tokens, or failures."""
        memory = self.memory
        drawn = memory.compute(self)
        if memory.launched == self.number:
            return [SampledToken(t) for t in drawn]
        fails = [memory._rng.random() < memory.failing for _ in drawn]
        memory.failed += sum(fails)
        # what failed is some other token, which the next step takes for the right one
        memory._drawn = [0 if failed else t for t, failed in zip(drawn, fails, strict=True)]
        return [SampledToken(-1 if failed else t) for t, failed in zip(drawn, fails, strict=True)]


def expected(sequence: Sequence, limit: int) -> list[int]:
    """Prompt and answer, from the definition."""
    ids = sequence.token_ids[: sequence.num_prompt_tokens]
    params = sequence.params
    for _ in range(params.max_tokens):
        ids.append(next_token(ids))
        if ids[-1] in params.stop_token_ids or len(ids) == limit:
            break
    return ids


def make_scheduler(num_blocks: int = 64, *, limit: int = 60, guesses: int = 0, reserve: float = 0.0) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, SIZE),
        max_num_seqs=6,
        max_batch_tokens=20,
        max_model_len=limit,
        admission_reserve=reserve,
        drafter=NgramDrafter(guesses) if guesses else None,
    )


def make_sequences(rng: random.Random, count: int, **params: Any) -> list[Sequence]:
    """Prompts that begin alike, and answers that end for all kinds of reasons."""
    shared = [rng.randrange(VOCAB) for _ in range(12)]
    made = []
    for i in range(count):
        ids = shared[: rng.choice((0, 5, 8, 12))] + [rng.randrange(VOCAB) for _ in range(rng.choice((1, 3, 9, 25)))]
        stops = frozenset(rng.sample(range(VOCAB), rng.choice((0, 0, 3, 10))))
        options: dict[str, Any] = {"max_tokens": rng.choice((0, 1, 2, 17, 40)), "stop_token_ids": stops, **params}
        made.append(Sequence(str(i), ids, len(ids), SamplingParams(**options), Timings(0.0)))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_every_answer_is_the_one_that_follows_from_its_tokens(seed: int) -> None:
    """Stops, limits, preemptions, shared prefixes, aborts and failing draws, in whatever order they fall."""
    rng = random.Random(seed)
    num_blocks = rng.choice((15, 18, 30, 64))  # the longest sequence takes 15
    scheduler = make_scheduler(num_blocks)
    sequences = make_sequences(rng, 40)
    if seed % 3 == 0:
        for sequence in rng.sample(sequences, 4):
            sequence.params = replace(sequence.params, repetition_penalty=1.1)
    memory = Memory(num_blocks, failing=0.02 if seed % 2 else 0.0)
    aborted: set[str] = set()
    by_name = {s.request_id: s for s in sequences}

    def act(loop: EngineLoop, output: StepOutput) -> None:
        if rng.random() < 0.02:
            victim = rng.choice(sequences)
            aborted.add(victim.request_id)
            loop.abort(victim)

    outputs = drive(scheduler, memory, sequences, act)
    assert memory.ahead > 5, "nothing ran ahead: the test shows nothing"
    assert (memory.failed > 0) == (seed % 2 == 1)
    for name, sequence in by_name.items():
        right = expected(sequence, scheduler.max_model_len)
        said = [o.token_id for o in outputs if o.request_id == name and o.token_id is not None]
        start = sequence.num_prompt_tokens
        assert said == right[start : start + len(said)], name
        if sequence.finish_reason is FinishReason.ABORT:
            assert name in aborted
            continue
        assert sequence.token_ids == right, name
        stopped = bool(said) and said[-1] in sequence.params.stop_token_ids
        assert sequence.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_tiny_pools_preempt_and_run_ahead() -> None:
    scheduler = make_scheduler(16)
    sequences = make_sequences(random.Random(3), 12, max_tokens=30, stop_token_ids=frozenset())
    memory = Memory(16)
    drive(scheduler, memory, sequences)
    assert scheduler.num_preemptions > 0 and memory.ahead > 10
    assert [s.token_ids for s in sequences] == [expected(s, 60) for s in sequences]


def test_nothing_is_launched_behind_a_last_token() -> None:
    """What ends by its length is known to end: 6 sequences of 8 tokens take 8 steps, not 9."""
    scheduler = make_scheduler(limit=20)
    memory = Memory(64)
    sequences = [Sequence(str(i), [i, 1], 2, SamplingParams(max_tokens=8), Timings(0.0)) for i in range(6)]
    drive(scheduler, memory, sequences)
    assert memory.launched == 8 and memory.ahead == 6 * 7


@pytest.mark.parametrize(
    "params",
    [{"frequency_penalty": 0.1}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"bad_words": ((1,), (2, 3))}],
)
def test_a_draw_that_needs_the_newest_token_waits_for_it(params: dict[str, Any]) -> None:
    memory = Memory(64)
    drive(make_scheduler(), memory, make_sequences(random.Random(1), 6, max_tokens=9, **params))
    assert memory.launched > 9 and memory.ahead == 0


@pytest.mark.parametrize("params", [{"bad_words": ((1,), (2,))}, {"allowed_token_ids": (1, 2)}])
def test_a_draw_that_does_not_look_back_does_not_wait(params: dict[str, Any]) -> None:
    memory = Memory(64)
    drive(make_scheduler(), memory, make_sequences(random.Random(1), 6, max_tokens=9, **params))
    assert memory.ahead > 0


def test_guesses_wait_for_their_text() -> None:
    memory = Memory(64)
    drive(make_scheduler(guesses=3), memory, make_sequences(random.Random(1), 6, max_tokens=9))
    assert memory.launched > 5 and memory.ahead == 0


def test_pages_of_an_ended_sequence_wait_for_the_step_that_writes_to_them() -> None:
    scheduler = make_scheduler(20)
    sequence = Sequence("a", [1, 2, 3], 3, SamplingParams(max_tokens=30, stop_token_ids=frozenset({7})), Timings(0.0))
    scheduler.add(sequence)
    first = scheduler.schedule(0.0)
    second = scheduler.schedule(0.0)
    assert first is not None and second is not None
    assert sequence.token_ids == [1, 2, 3, -1]
    [output] = scheduler.commit(first, [SampledToken(7)], 0.0)
    assert output.finish_reason is FinishReason.STOP and sequence.token_ids == [1, 2, 3, 7]
    assert scheduler.blocks.num_free == 19
    scheduler.check()
    assert scheduler.commit(second, [SampledToken(9)], 0.0) == []
    assert scheduler.blocks.num_free == 20 and sequence.token_ids == [1, 2, 3, 7]


def test_no_page_is_shared_before_its_tokens_are_known() -> None:
    scheduler = make_scheduler(20)
    scheduler.add(Sequence("a", [1, 2, 3], 3, SamplingParams(max_tokens=30), Timings(0.0)))
    before = scheduler.schedule(0.0)
    for number in range(12):
        batch = scheduler.schedule(0.0)
        assert before is not None and batch is not None
        scheduler.commit(before, [SampledToken(5)], 0.0)
        before = batch
        pages = [page for _, page in scheduler.blocks._index]
        assert len(pages) == (3 + number) // SIZE
        assert all(token >= 0 for page in pages for token in page)


def test_a_step_that_fails_behind_another_ends_every_sequence() -> None:
    class Failing(Memory):
        def compute(self, orders: Orders) -> list[int]:
            if orders.number == 5:
                raise RuntimeError("planted fault")
            return super().compute(orders)

    scheduler, memory = make_scheduler(), Failing(64)
    sequences = make_sequences(random.Random(2), 9, max_tokens=20, stop_token_ids=frozenset())
    loop = EngineLoop(scheduler, memory)
    outputs: list[StepOutput] = []
    for sequence in sequences:
        loop.add(sequence)
    loop.start(outputs.extend)
    end = time.monotonic() + 20
    while loop.alive and time.monotonic() < end:
        time.sleep(0.002)
    assert not loop.alive and memory.ahead > 0
    assert all(s.finish_reason is FinishReason.ERROR for s in sequences)
    assert sum(o.error is not None for o in outputs) == 9
    assert scheduler.blocks.num_free == 64
