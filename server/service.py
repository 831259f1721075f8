"""What stands behind the port: the options, the metrics, the model with its life, and what requests ask of them.

Not HTTP (`server.app` is), not the engine, and none of the work of coming and going: `server.lifecycle` has that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import ServerConfig
from server.door import Door
from server.engine.engine import Engine, EngineStats, ModelInfo
from server.engine.structured import GrammarCompiler
from server.errors import EngineError, Overloaded
from server.lifecycle import Lifecycle
from server.loader import Loader
from server.metrics import Metrics
from server.progress import Progress, Status
from server.slot import Slot

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

CANCEL_S = 5.0  # what a start-up gets to notice that it is not wanted any more


def default_name(model: str) -> str:
    """What clients call a model where no name was given: the last part of its folder or hub id."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model.rsplit("/", 1)[-1]


class Service:
    """Holds what requests need. The model's comings and goings are `life`'s."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.served_names = config.served_model_names or (default_name(config.model),)
        self.metrics = Metrics(self.served_names[0])
        self.on_failure: Callable[[], None] = lambda: None  # of the first load
        progress = Progress()
        self._loader = Loader(config, progress, self.metrics)
        self._slot = Slot(self.served_names)
        self.life = Lifecycle(config, self._slot, progress, self._loader)
        self._first_load: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Engine | None:
        """None before the first load, and while the model sleeps or is loaded again."""
        return self._slot.engine

    @property
    def door(self) -> Door:
        """Who is inside with the model."""
        return self.life.door

    def status(self) -> Status:
        """Where the server stands."""
        return self.life.status()

    def stats(self) -> EngineStats:
        """A reading of the engine: all zero where there is none, but for the counters of those before."""
        return self._slot.stats()

    def info(self) -> ModelInfo | None:
        """What is served, with the bytes that it holds now; None before the first load."""
        return self._slot.info_now()

    def facts(self) -> tuple[ModelInfo, Tokenizer]:
        """What is served and its tokenizer, also while it sleeps. Raises as `ready` does where there was none yet."""
        info, tokenizer = self._slot.info, self._slot.tokenizer
        if info is None or tokenizer is None or (self.engine is None and self.status().phase == "failed"):
            self.life.check_waitable()
            raise AssertionError("without a model, requests are refused")
        return info, tokenizer

    def ready(self) -> tuple[Engine, Tokenizer]:
        """What serves requests. Raises Overloaded while it is not there, EngineError after a failure."""
        engine, tokenizer = self._slot.engine, self._slot.tokenizer
        if engine is None or tokenizer is None:
            self.life.check_waitable()
            raise EngineError("the model was dropped while this request used it")
        return engine, tokenizer

    async def wait_open(self, deadline_s: float | None) -> None:
        """Until the model can be used; see `Lifecycle.wait_open`."""
        await self.life.wait_open(deadline_s)

    def check_room(self) -> None:
        """Raise Overloaded where one more sequence would find no place."""
        self.life.check_room()

    @property
    def grammars(self) -> GrammarCompiler:
        """What compiles schemas and grammars for the model. Raises as `ready` does."""
        self.ready()
        return self._slot.grammars()

    def start(self) -> None:
        """Begin start-up; outputs will be delivered on the running event loop."""
        self._first_load = asyncio.get_running_loop().create_task(self._start())

    async def wait_started(self) -> None:
        """Until the first load has ended. Raises EngineError where there is no model then."""
        assert self._first_load is not None
        await self._first_load
        self.ready()

    async def drain(self) -> None:
        """Unready at once; accepted requests may end within the drain timeout, new ones are refused."""
        await self.life.end()

    def close(self) -> None:
        """Wait a little for a start-up that was cut off, so that it removes its unfinished files."""
        self._loader.stop()
        self._loader.join(CANCEL_S)

    @property
    def is_starting(self) -> bool:
        """Whether the start-up thread still runs."""
        return self._loader.is_running

    async def _start(self) -> None:
        try:
            await self.life.start()
        except EngineError:
            self.on_failure()
        except Overloaded:
            return  # cut off by the end of the process
