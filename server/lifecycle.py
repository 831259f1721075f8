"""When the model is there: loaded at start, dropped to sleep, loaded again for the next request or for the operator.

Not how it is loaded (`server.loader`), nor who is inside (`server.door`). On the event loop only. One change at a time,
in the order they were asked for; only the end of the process waits for none.

Asleep, nothing of the engine is kept, neither on a device nor on the host: the kernel's cache of files has the packed
weights, and gives them up where somebody needs the memory. The start-up reads them from there: one path to an engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from server.config import ServerConfig
from server.door import Door
from server.engine.engine import Engine
from server.errors import Conflict, DeadlineExceeded, EngineError, Overloaded, ServeError
from server.loader import Loader
from server.progress import Phase, Progress, StartUpCancelled, StartUpError, Status
from server.slot import Slot
from spq.sizes import format_bytes

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EXPECTED_START_S = 10  # Retry-After while nothing better is known
DRAINING_RETRY_S = 5


class Lifecycle:
    """Changes what is in the slot, and opens and shuts the door accordingly."""

    def __init__(self, config: ServerConfig, slot: Slot, progress: Progress, loader: Loader) -> None:
        """The slot is empty."""
        self.door = Door(config.sleep_idle_s, self._on_idle)
        self._config = config
        self._slot = slot
        self._progress = progress
        self._loader = loader
        self._changing = asyncio.Lock()
        self._num_waiting = 0  # requests before the door
        self._refusing = False  # drained by the operator
        self._ending = False  # the process is
        self._revival: asyncio.Task[None] | None = None  # for the requests that wait
        self._nap: asyncio.Task[None] | None = None

    def status(self) -> Status:
        """Where the server stands."""
        status = self._progress.status()
        if status.phase == "ready" and self.door.is_open and not self._is_alive:
            return replace(status, phase="failed", error="the engine stopped after an error; see the log")
        return replace(status, accepts=self._refusal(status) is None)

    def check_waitable(self) -> None:
        """Raise what a request gets that neither finds the model nor may wait for it: Overloaded, EngineError."""
        refusal = self._refusal(self._progress.status())
        if refusal is not None:
            raise refusal

    def check_room(self) -> None:
        """Raise Overloaded where one more sequence would find the queue full, or the place before the door."""
        engine, info = self._slot.engine, self._slot.info
        if engine is not None and self.door.is_open:
            engine.check_room()
        elif info is not None and self._num_waiting >= self._config.max_queue + info.max_num_seqs:
            eta_s = self._progress.status().eta_s
            raise Overloaded(
                f"{self._num_waiting} requests wait for the model to be loaded again, as many as then find a place; "
                "retry later or raise --max-queue",
                retry_after_s=round(eta_s) if eta_s is not None else EXPECTED_START_S,
            )

    async def wait_open(self, deadline_s: float | None) -> None:
        """Until the door is open; a model that sleeps is woken for it. `deadline_s` is monotonic.

        Raises what `check_waitable` and `check_room` raise, DeadlineExceeded.
        """
        self.check_waitable()
        self.check_room()
        started = time.monotonic()
        self._num_waiting += 1
        try:
            while not self.door.is_open:
                self.check_waitable()
                if self._revival is None or self._revival.done():
                    self._revival = asyncio.create_task(self._revive())
                left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                _, late = await asyncio.wait((self._revival,), timeout=left_s)
                if late:  # not self._revival: another waiter may have begun the next one
                    raise DeadlineExceeded(
                        f"the request's deadline passed after {time.monotonic() - started:.1f} s, while the model was "
                        "being loaded again; allow more time"
                    )
        finally:
            self._num_waiting -= 1

    async def start(self) -> None:
        """The first load. Raises EngineError, Overloaded where it was cut off."""
        async with self._changing:
            await self._load("starting")

    async def wake(self) -> None:
        """Have the model ready, also after a drain or a failure. Raises EngineError, Overloaded."""
        async with self._changing:
            self._check_not_ending()
            if not (self.door.is_open and self._is_alive):
                await self._vacate()
                await self._load("loading")

    async def reload(self) -> None:
        """Load the model anew; requests wait. The old one is gone before. Raises EngineError, Overloaded."""
        async with self._changing:
            self._check_not_ending()
            await self._vacate()
            await self._load("loading")

    async def sleep(self, *, wait: bool) -> None:
        """Drop the model until a request comes; with `wait`, after those inside have ended. Raises Conflict."""
        async with self._changing:
            self._check_not_ending()
            if self.status().phase == "failed":
                raise Conflict("the model has failed, so it cannot sleep; reload it")
            if self.door.num_inside and not wait:
                raise Conflict(
                    f"{self.door.num_inside} requests are inside; send wait: true to let them end first",
                    code="busy",
                )
            await self._fall_asleep()

    async def drain(self) -> None:
        """Refuse requests, let those inside end, drop the model; until woken or reloaded."""
        async with self._changing:
            self._check_not_ending()
            self._refusing = True
            if self.door.is_open:
                self._progress.enter("draining")
            await self._vacate()
            self._progress.enter("drained")

    async def end(self) -> None:
        """The process ends: unready at once; accepted requests may end within the drain timeout, others are refused."""
        if self._ending:
            return
        self._ending = True
        self._loader.stop()
        self._progress.close()
        self.door.shut()
        if self._slot.engine is not None:
            await self._slot.engine.drain(self._config.drain_timeout_s)

    def install(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Serve with this engine, which is started here."""
        engine.start(asyncio.get_running_loop())
        self._slot.put(engine, tokenizer)
        self._refusing = False
        self._progress.enter("ready")
        self.door.open()

    @property
    def _is_alive(self) -> bool:
        return self._slot.engine is not None and self._slot.engine.stats().alive

    def _refusal(self, status: Status) -> ServeError | None:
        if self._ending or self._refusing:
            what = "shutting down" if self._ending else "drained"
            return Overloaded(
                f"the server is {what}; send the request to another replica",
                retry_after_s=DRAINING_RETRY_S,
                code="draining",
            )
        if status.phase == "failed":
            return EngineError(f"the model could not be loaded: {status.error}")
        if self._slot.info is None:
            return Overloaded(
                f"the model is not ready: {status.phase} {status.detail}".rstrip() + f", {status.progress:.0%} done",
                retry_after_s=round(status.eta_s) if status.eta_s is not None else EXPECTED_START_S,
                code="model_loading",
            )
        return None

    def _check_not_ending(self) -> None:
        if self._ending:
            self.check_waitable()

    async def _revive(self) -> None:
        """For requests: not against what the operator has asked for meanwhile."""
        async with self._changing:
            if self.door.is_open or self._refusal(self._progress.status()) is not None:
                return
            try:
                await self._load("loading")
            except ServeError as error:
                logger.debug("those who wait are told: %s", error.message)

    def _on_idle(self) -> None:
        if not self._changing.locked():  # else the door is opened again, and the time counts anew
            self._nap = asyncio.create_task(self._take_nap())

    async def _take_nap(self) -> None:
        async with self._changing:
            if self.door.is_open and self.door.num_inside == 0 and self._is_alive:
                logger.info("no request for %g s", self._config.sleep_idle_s)
                await self._fall_asleep()

    async def _fall_asleep(self) -> None:
        await self._vacate()
        self._refusing = False
        self._progress.enter("sleeping")

    async def _vacate(self) -> None:
        """Shut the door, let those inside end within the drain timeout, then drop the engine and its memory."""
        self.door.shut()
        engine = self._slot.engine
        if engine is None:
            return
        started = time.monotonic()
        if not await self.door.wait_empty(self._config.drain_timeout_s):
            logger.warning("%d requests are cut off after the drain timeout", self.door.num_inside)
        await engine.drain(0)
        from server.engine.release import held_bytes, release_engine  # torch: loaded with the engine

        before = held_bytes(engine.info.device)
        after = await asyncio.to_thread(release_engine, self._slot.clear())
        logger.info(
            "the model is gone after %.2f s; the process holds %s on %s, %s before",
            time.monotonic() - started,
            format_bytes(after),
            engine.info.device,
            format_bytes(before),
        )

    async def _load(self, phase: Phase) -> None:
        started = time.monotonic()
        self._progress.begin(phase)
        try:
            engine, tokenizer = await self._loader.load()
        except StartUpCancelled as error:
            self.check_waitable()
            raise AssertionError("only the end of the process cuts a start off") from error
        except StartUpError as error:
            logger.error("cannot serve %s: %s", self._config.model, error)
            self._progress.enter("failed", str(error))
            raise EngineError(f"the model could not be loaded: {error}") from None
        if self._ending:
            self.check_waitable()
        self.install(engine, tokenizer)
        logger.info("loaded in %.2f s", time.monotonic() - started)
