"""The engine under concurrency: answers do not depend on company, aborts and preemptions leave nothing behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from harness import Harness
from models import SMALL, random_model, real_model

from server.core import FinishReason, SampledToken, SamplingParams, ScheduledBatch, Sequence, StepTimes, Timings
from server.engine.engine import Engine, Generation, GenerationRequest, ModelInfo
from server.engine.loop import EngineLoop, Runner
from server.errors import BadRequest, DeadlineExceeded, EngineError, Overloaded
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler


def info(scheduler: Scheduler, vocab: int = 1000) -> ModelInfo:
    blocks = scheduler.blocks
    return ModelInfo(
        max_model_len=scheduler.max_model_len,
        vocab_size=vocab,
        hidden_size=8,
        eos_token_ids=(),
        block_size=blocks.block_size,
        num_blocks=blocks.num_blocks,
        kv_tokens=blocks.num_blocks * blocks.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        dtype="float32",
        kv_dtype="float32",
        device="cpu",
        backend="cpu",
        ledger={},
    )


@asynccontextmanager
async def running(scheduler: Scheduler, runner: Runner, max_queue: int = 256) -> AsyncIterator[Engine]:
    engine = Engine(EngineLoop(scheduler, runner, check_every_step=True), info(scheduler), max_queue=max_queue)
    engine.start(asyncio.get_running_loop())
    try:
        yield engine
    finally:
        await engine.drain(timeout_s=0)


class FakeRunner:
    """Draws the index of the output token; may be slow, or fail at a step."""

    runs_ahead = False

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None) -> None:
        self.seconds = seconds
        self.fail_at = fail_at
        self.steps = 0

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> FakeRunner:
        self.batch = batch
        return self

    def result(self) -> list[SampledToken]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("planted fault")
        time.sleep(self.seconds)
        return [SampledToken(10 + w.sequence.num_output_tokens) for w in self.batch.work if w.samples]


def small_scheduler(num_blocks: int = 64, max_num_seqs: int = 8) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=32,
        max_model_len=100,
        admission_reserve=0.5,
    )


def request(name: str, prompt: int = 5, deadline_s: float | None = None, **params: object) -> GenerationRequest:
    options: dict[str, object] = {"max_tokens": 6, "temperature": 0.0, **params}
    ids = [3 + (i % 90) for i in range(prompt)]
    return GenerationRequest(name, ids, SamplingParams(**options), deadline_s)  # type: ignore[arg-type]


async def collect(generation: Generation, stop_after: int | None = None) -> list[int]:
    tokens: list[int] = []
    try:
        async for outputs in generation:
            tokens += [output.token_id for output in outputs if output.token_id is not None]
            if stop_after is not None and len(tokens) >= stop_after:
                break
    finally:
        generation.abort()
    return tokens[:stop_after]


async def until_empty(engine: Engine, steps_s: float = 5.0) -> None:
    """Wait until the loop has read every abort."""
    end = time.monotonic() + steps_s
    while (s := engine.stats()).num_running or s.num_waiting:
        assert time.monotonic() < end, f"still live: {s}"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ["random", "demo"])
def test_64_requests_with_aborts_and_preemptions_answer_as_if_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path
    if name == "random":
        random_model("llama").save_pretrained(tmp_path)
    else:
        real = real_model(name)
        if real is None:
            pytest.skip(f"{name} is not on this machine")
        folder = real
    rng = random.Random(7)
    shared = [rng.randrange(3, SMALL["vocab_size"]) for _ in range(40)]
    prompts = []
    for _ in range(64):
        own = [rng.randrange(3, SMALL["vocab_size"]) for _ in range(rng.choice((1, 3, 17, 30, 60)))]
        prompts.append(shared[: rng.choice((0, 16, 40))] + own)
    lengths = [rng.randrange(8, 48) for _ in prompts]
    aborted = {i: rng.randrange(1, 6) for i in rng.sample(range(64), 21)}
    # 60 pages of 8 tokens hold about 8 of the sequences to their end; no page is reserved for what is to come
    harness = Harness(folder, num_blocks=60, block_size=8, max_num_seqs=16, admission_reserve=0.0)

    async def serve() -> list[list[int]]:
        async with running(harness.scheduler, harness.runner) as engine:
            generations = engine.submit(
                [
                    GenerationRequest(str(i), p, SamplingParams(max_tokens=lengths[i], temperature=0.0))
                    for i, p in enumerate(prompts)
                ]
            )
            answers = await asyncio.gather(*(collect(g, aborted.get(i)) for i, g in enumerate(generations)))
            await until_empty(engine)
            assert engine.stats().kv_usage == 0.0
            assert engine.stats().num_preemptions > 0, "the test must force preemptions"
            return answers

    answers = asyncio.run(serve())
    alone = Harness(folder, num_blocks=60, block_size=8, prefix_caching=False)
    for i, prompt in enumerate(prompts):
        [sequence] = alone.run([alone.sequence(prompt, max_tokens=lengths[i])])
        expected = sequence.token_ids[len(prompt) :]
        assert answers[i] == (expected[: aborted[i]] if i in aborted else expected), f"request {i}"


def test_sampled_answers_with_a_seed_do_not_depend_on_company(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    harness = Harness(tmp_path)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, SMALL["vocab_size"], (n,), generator=rng).tolist() for n in (4, 20, 33)]
    together = harness.run(
        [harness.sequence(p, str(i), temperature=0.9, top_p=0.9, seed=11) for i, p in enumerate(prompts)]
    )
    for prompt, sequence in zip(prompts, together, strict=True):
        [alone] = harness.run([harness.sequence(prompt, temperature=0.9, top_p=0.9, seed=11)])
        assert alone.token_ids == sequence.token_ids


def test_tokens_of_a_step_are_published_between_launch_and_result_of_the_next() -> None:
    happened: list[str] = []

    class Watched(FakeRunner):
        def launch(self, batch: ScheduledBatch, times: StepTimes) -> FakeRunner:
            happened.append("launch")
            return super().launch(batch, times)

        def result(self) -> list[SampledToken]:
            happened.append("result")
            return super().result()

    loop = EngineLoop(small_scheduler(), Watched())
    sequence = Sequence("a", [3, 4], 2, SamplingParams(max_tokens=3), Timings(0.0))
    loop.add(sequence)
    loop.start(lambda outputs: happened.append(f"publish {[o.token_id for o in outputs]}"))
    end = time.monotonic() + 5
    while len(happened) < 9 and time.monotonic() < end:
        time.sleep(0.01)
    loop.stop()
    assert happened == ["launch", "result", "launch", "publish [10]", "result", "launch", "publish [11]", "result",
                        "publish [12]"]  # fmt: skip


def test_an_abort_frees_its_pages_within_one_step() -> None:
    async def serve() -> None:
        scheduler = small_scheduler()
        runner = FakeRunner(0.02)
        async with running(scheduler, runner) as engine:
            [generation] = engine.submit([request("a", max_tokens=90)])
            await anext(generation)
            steps = runner.steps
            generation.abort()
            await until_empty(engine)
            assert runner.steps <= steps + 2  # the one in progress, and at most one that had begun meanwhile
            assert scheduler.blocks.num_free == scheduler.blocks.num_blocks

    asyncio.run(serve())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def serve() -> None:
        async with running(small_scheduler(max_num_seqs=2), FakeRunner(0.01), max_queue=3) as engine:
            accepted = engine.submit([request(f"r{i}") for i in range(5)])  # 2 run, 3 wait
            with pytest.raises(Overloaded, match="limit of 3") as caught:
                engine.submit([request("one too many")])
            assert int(caught.value.headers["Retry-After"]) >= 1
            assert [await collect(g) for g in accepted] == [[10, 11, 12, 13, 14, 15]] * 5
            await until_empty(engine)
            [late] = engine.submit([request("late")])
            assert len(await collect(late)) == 6

    asyncio.run(serve())


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    async def serve() -> None:
        async with running(small_scheduler(max_num_seqs=1), FakeRunner(0.02)) as engine:
            now = time.monotonic()
            first, second = engine.submit(
                [request("runs", max_tokens=90, deadline_s=now + 0.2), request("waits", deadline_s=now + 0.1)]
            )
            with pytest.raises(DeadlineExceeded):
                await collect(second)
            with pytest.raises(DeadlineExceeded, match="tokens generated"):
                await collect(first)
            await until_empty(engine)

    asyncio.run(serve())


def test_a_failing_step_ends_every_stream_and_the_engine() -> None:
    async def serve() -> None:
        engine = Engine(
            EngineLoop(small_scheduler(max_num_seqs=2), FakeRunner(fail_at=3)), info(small_scheduler()), max_queue=9
        )
        engine.start(asyncio.get_running_loop())
        generations = engine.submit([request(f"r{i}") for i in range(4)])
        results = await asyncio.gather(*(collect(g) for g in generations), return_exceptions=True)
        assert all(isinstance(r, EngineError) for r in results)
        assert not engine.stats().alive
        with pytest.raises(EngineError, match="must be restarted"):
            engine.submit([request("after")])

    asyncio.run(serve())


def test_what_can_never_fit_is_refused() -> None:
    async def serve() -> None:
        async with running(small_scheduler(num_blocks=4), FakeRunner()) as engine:
            with pytest.raises(BadRequest, match="maximum context length is 100 tokens") as caught:
                engine.submit([request("fits"), request("large", prompt=60)])
            assert caught.value.code == "context_length_exceeded"
            assert engine.stats().num_waiting == 0  # all or nothing

    asyncio.run(serve())


def test_a_drain_lets_accepted_requests_end_and_refuses_new_ones() -> None:
    async def serve() -> None:
        scheduler = small_scheduler()
        engine = Engine(EngineLoop(scheduler, FakeRunner(0.01)), info(scheduler), max_queue=9)
        engine.start(asyncio.get_running_loop())
        [generation] = engine.submit([request("a", max_tokens=20)])
        drained = asyncio.create_task(engine.drain(timeout_s=5))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            engine.submit([request("b")])
        assert caught.value.code == "draining"
        assert len(await collect(generation)) == 20
        await drained
        assert not engine.stats().alive

    asyncio.run(serve())


def test_a_drain_that_runs_out_of_time_tells_the_streams() -> None:
    async def serve() -> None:
        scheduler = small_scheduler()
        engine = Engine(EngineLoop(scheduler, FakeRunner(0.05)), info(scheduler), max_queue=9)
        engine.start(asyncio.get_running_loop())
        [generation] = engine.submit([request("a", max_tokens=90)])
        task = asyncio.create_task(collect(generation))
        await engine.drain(timeout_s=0.1)
        with pytest.raises(EngineError, match="stopped before"):
            await task

    asyncio.run(serve())


def test_finish_reasons_reach_the_last_output() -> None:
    async def serve() -> None:
        async with running(small_scheduler(), FakeRunner()) as engine:
            length, stop = engine.submit(
                [request("length", max_tokens=3), request("stop", stop_token_ids=frozenset({12}))]
            )
            for generation, reason in ((length, FinishReason.LENGTH), (stop, FinishReason.STOP)):
                reasons = [output.finish_reason async for outputs in generation for output in outputs]
                assert reasons == [None, None, reason]

    asyncio.run(serve())


def test_tokens_that_nobody_read_yet_come_together_and_before_a_failure() -> None:
    async def serve() -> None:
        engine = Engine(EngineLoop(small_scheduler(), FakeRunner(fail_at=4)), info(small_scheduler()), max_queue=9)
        engine.start(asyncio.get_running_loop())
        [generation] = engine.submit([request("a")])
        while engine.stats().alive:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)  # for the last delivery
        assert [output.token_id for output in await anext(generation)] == [10, 11, 12]
        with pytest.raises(EngineError):
            await anext(generation)
        with pytest.raises(StopAsyncIteration):
            await anext(generation)

    asyncio.run(serve())
