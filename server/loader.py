"""Runs the start-up on a thread of its own, so that the port answers meanwhile and the process can end under it.

Not the steps (`server.startup`) and not what is done with the engine (`server.lifecycle`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from server.config import ServerConfig
from server.engine.engine import Engine
from server.metrics import Metrics
from server.progress import Phase, Progress, StartUpCancelled, StartUpError

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Loaded = tuple[Engine, "Tokenizer"]


class Loader:
    """One start at a time; `stop` ends the one that runs and forbids others."""

    def __init__(self, config: ServerConfig, progress: Progress, metrics: Metrics) -> None:
        self._config = config
        self._progress = progress
        self._metrics = metrics
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._outcome: asyncio.Future[Loaded] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread of a start still lives, wanted or not."""
        return self._thread is not None and self._thread.is_alive()

    async def load(self) -> Loaded:
        """An engine, not started, and its tokenizer. Raises StartUpError with the reason, StartUpCancelled."""
        if self._stopped.is_set():
            raise StartUpCancelled
        event_loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Loaded] = event_loop.create_future()
        self._outcome = outcome

        def tell(result: Loaded | Exception) -> None:
            if outcome.done():
                return
            if isinstance(result, Exception):
                outcome.set_exception(result)
            else:
                outcome.set_result(result)

        def run() -> None:
            result = self._start_up()
            with suppress(RuntimeError):  # the event loop is closed: the process ends
                event_loop.call_soon_threadsafe(tell, result)

        self._thread = threading.Thread(target=run, name="start-up", daemon=True)
        self._thread.start()
        try:
            return await outcome
        finally:
            self._outcome = None

    def stop(self) -> None:
        """Whoever waits for a start gets StartUpCancelled now; its thread ends at its next report."""
        self._stopped.set()
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(StartUpCancelled())

    def join(self, timeout_s: float) -> None:
        """Wait for a start that was cut off, so that it removes its unfinished files."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _start_up(self) -> Loaded | Exception:
        """A failure is returned without its traceback, whose frames would hold what was loaded by then."""
        try:
            from server import startup  # torch and transformers take seconds to import: the port is open meanwhile

            return startup.start_up(self._config, self._report, on_step=self._metrics.step)
        except StartUpCancelled:
            logger.info("start-up was cut off")
            return StartUpCancelled()
        except StartUpError as error:
            return StartUpError(str(error))
        except Exception as error:
            logger.exception("start-up failed")
            return StartUpError(f"{type(error).__name__}: {error}")

    def _report(self, phase: Phase, progress: float, detail: str = "", eta_s: float | None = None) -> None:
        if self._stopped.is_set():
            raise StartUpCancelled
        self._progress.report(phase, progress, detail, eta_s)
