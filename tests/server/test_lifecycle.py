"""The life of the model alone: a scripted engine in place of one, changes that meet each other and the end.

With real models and over sockets: `test_sleep.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server import startup
from server.config import ServerConfig
from server.core import SampledToken, SamplingParams, ScheduledBatch, StepTimes
from server.door import Door, Visit
from server.engine.engine import Engine, GenerationRequest, ModelInfo
from server.engine.loop import EngineLoop
from server.errors import Conflict, EngineError, Overloaded
from server.progress import StartUpError
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler
from server.service import Service


class Runner:
    """Draws a constant, slowly; may fail."""

    runs_ahead = False

    def __init__(self, starts: Starts) -> None:
        self._starts = starts

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> Runner:
        self.batch = batch
        return self

    def result(self) -> list[SampledToken]:
        if self._starts.step_fails:
            raise RuntimeError("planted fault")
        time.sleep(0.01)
        return [SampledToken(7) for w in self.batch.work if w.samples]


class Starts:
    """In place of `startup.start_up`: counts, waits where told to, fails where told to."""

    def __init__(self) -> None:
        self.count = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None
        self.step_fails = False

    def __call__(self, config: ServerConfig, report: Callable[..., None], *, on_step: Any) -> Any:
        self.count += 1
        report("loading", 0.5)
        assert self.may_go_on.wait(30)
        report("warming_up", 0.5)
        if self.failure is not None:
            raise self.failure
        blocks = BlockManager(64, 4)
        scheduler = Scheduler(blocks, max_num_seqs=4, max_batch_tokens=32, max_model_len=100, admission_reserve=0.0)
        info = ModelInfo(
            max_model_len=100, vocab_size=9, hidden_size=1, eos_token_ids=(), block_size=4, num_blocks=64,
            kv_tokens=256, max_num_seqs=4, dtype="none", kv_dtype="none", device="cpu", backend="none",
            ledger={"weights": 5},
        )  # fmt: skip
        return Engine(EngineLoop(scheduler, Runner(self)), info, max_queue=config.max_queue), object()


@asynccontextmanager
async def started(starts: Starts, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Service]:
    monkeypatch.setattr(startup, "start_up", starts)
    service = Service(ServerConfig(model="none", drain_timeout_s=5, **options))
    service.start()
    try:
        while service.engine is None:
            await asyncio.sleep(0.005)
        yield service
    finally:
        starts.may_go_on.set()
        await service.drain()
        service.close()


@pytest.fixture
def starts() -> Starts:
    return Starts()


def run(scene: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def request(service: Service, num_tokens: int = 5) -> int:
    """What a handler does, from the door to the last token."""
    visit = Visit(service.door)
    try:
        while not service.door.is_open:
            await service.wait_open(None)
        engine, _ = service.ready()
        visit.begin()
        await asyncio.sleep(0)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        [generation] = engine.submit([GenerationRequest(str(id(visit)), [3, 4, 5], params)])
        return sum([len(outputs) async for outputs in generation])
    finally:
        visit.end()


def test_the_end_while_asleep_and_while_it_wakes(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asleep() -> None:
        async with started(starts, monkeypatch) as service:
            await service.life.sleep(wait=False)
            await service.drain()
            assert service.status().phase == "draining" and not service.status().accepts
            with pytest.raises(Overloaded, match="shutting down"):
                await request(service)

    async def waking() -> None:
        async with started(starts, monkeypatch) as service:
            await service.life.sleep(wait=False)
            starts.may_go_on.clear()
            waiting = asyncio.create_task(request(service))
            ordered = asyncio.create_task(service.life.wake())
            await until(lambda: service.status().phase == "loading")
            await service.drain()
            for task in (waiting, ordered):
                with pytest.raises(Overloaded, match="shutting down"):
                    await task
            starts.may_go_on.set()
            service.close()
            assert service.engine is None and not service.is_starting
            assert service.status().phase == "draining"

    run(asleep)
    run(waking)


def test_the_end_while_a_reload_waits_for_requests(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            running = asyncio.create_task(request(service, 60))
            await until(lambda: service.stats().num_running == 1)
            reload = asyncio.create_task(service.life.reload())
            await until(lambda: not service.door.is_open)
            waiting = asyncio.create_task(request(service))
            await asyncio.sleep(0.05)
            await service.drain()
            assert await running == 60, "what was accepted ends properly"
            for task in (reload, waiting):
                with pytest.raises(Overloaded, match="shutting down"):
                    await task
            assert starts.count == 1

    run(scene)


def test_changes_are_made_one_after_the_other(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            life = service.life
            orders = [
                life.reload(),
                life.wake(),
                life.sleep(wait=False),
                life.sleep(wait=True),
                life.wake(),
                life.drain(),
            ]
            await asyncio.gather(*orders)
            assert starts.count == 3 and service.status().phase == "drained"
            # what the operator asked for is not undone by a request that came before it
            await life.wake()
            slept = asyncio.create_task(life.sleep(wait=True))
            drained = asyncio.create_task(life.drain())
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="drained"):
                await request(service)
            await asyncio.gather(slept, drained)
            assert service.status().phase == "drained" and starts.count == 4
            # and the last order counts
            await life.sleep(wait=False)
            assert await request(service) == 5 and starts.count == 5

    run(scene)


def test_a_second_reload_behind_the_first_makes_no_request_late(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The door opens and shuts before those who wait look; the first of them has the model brought back once more."""

    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            starts.may_go_on.clear()
            reloads = [asyncio.create_task(service.life.reload())]
            await until(lambda: not service.door.is_open)
            requests = [asyncio.create_task(request(service)) for _ in range(3)]
            await asyncio.sleep(0.02)
            reloads.append(asyncio.create_task(service.life.reload()))
            await asyncio.sleep(0.02)
            starts.may_go_on.set()
            assert await asyncio.gather(*requests) == [5] * 3
            await asyncio.gather(*reloads)
            assert starts.count == 3

    run(scene)


def test_requests_that_run_end_before_the_model_goes(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            running = [asyncio.create_task(request(service, 30)) for _ in range(3)]
            await until(lambda: service.stats().num_running == 3)
            with pytest.raises(Conflict, match="3 requests are inside"):
                await service.life.sleep(wait=False)
            reload = asyncio.create_task(service.life.reload())
            await until(lambda: not service.door.is_open)
            assert service.status().accepts and service.status().phase == "ready"
            late = asyncio.create_task(request(service))
            assert await asyncio.gather(*running) == [30] * 3
            await reload
            assert await late == 5 and starts.count == 2

    run(scene)


def test_what_outlasts_the_drain_timeout_is_told(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            object.__setattr__(service.config, "drain_timeout_s", 0.05)
            running = asyncio.create_task(request(service, 90))
            await until(lambda: service.stats().num_running == 1)
            await service.life.reload()
            with pytest.raises(EngineError, match="stopped before"):
                await running
            assert await request(service) == 5

    run(scene)


def test_counters_go_on_where_the_engine_before_ended(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            seen = [service.stats().prefix_queries]
            for _ in range(3):
                await request(service)
                seen.append(service.stats().prefix_queries)
                await service.life.sleep(wait=True)
                seen.append(service.stats().prefix_queries)
            assert seen == [0, 3, 3, 6, 6, 9, 9]
            info = service.info()
            assert info is not None and info.ledger == {"weights": 0}

    run(scene)


def test_a_failed_load_is_told_and_may_be_tried_again(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch) as service:
            starts.failure = StartUpError("the folder has no config.json")
            with pytest.raises(EngineError, match=r"no config\.json"):
                await service.life.reload()
            assert service.status().phase == "failed" and service.status().error == "the folder has no config.json"
            for _ in range(2):
                with pytest.raises(EngineError, match=r"no config\.json"):
                    await request(service)
            assert starts.count == 2, "a request does not try again"
            starts.failure = ValueError("a bug")
            with pytest.raises(EngineError, match="ValueError: a bug"):
                await service.life.wake()
            starts.failure = None
            await service.life.wake()
            assert await request(service) == 5 and service.status().error is None

    run(scene)


def test_an_engine_that_failed_can_be_reloaded_and_does_not_fall_asleep(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with started(starts, monkeypatch, sleep_idle_s=0.1) as service:
            starts.step_fails = True
            with pytest.raises(EngineError):
                await request(service)
            await asyncio.sleep(0.3)
            assert service.status().phase == "failed", "a failure stays seen"
            with pytest.raises(Conflict, match="failed"):
                await service.life.sleep(wait=True)
            starts.step_fails = False
            await service.life.wake()
            assert await request(service) == 5

    run(scene)


def test_the_idle_time_counts_from_when_the_last_one_left() -> None:
    async def scene() -> None:
        calls: list[float] = []
        door = Door(0.2, lambda: calls.append(time.monotonic()))
        first, second = Visit(door), Visit(door)
        second.end()  # it never came in
        door.open()
        first.begin()
        first.begin()
        second.begin()
        first.end()
        await asyncio.sleep(0.3)
        assert not calls, "somebody is inside"
        second.end()
        second.end()
        left = time.monotonic()
        assert door.num_inside == 0
        await asyncio.sleep(0.1)
        third = Visit(door)
        third.begin()
        await asyncio.sleep(0.2)
        third.end()
        await asyncio.sleep(0.3)
        assert len(calls) == 1 and calls[0] - left > 0.45
        door.shut()
        door.open()
        door.shut()
        await asyncio.sleep(0.3)
        assert len(calls) == 1, "nobody sleeps behind a shut door"

    run(scene)
