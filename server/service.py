"""The life of the server behind its port: resolve, compress if needed, load, serve, drain.

Not HTTP (`server.app` is) and not the engine: it runs start-up in a thread so that the port is open from the first
second, and says at any time which phase it is in and how far.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from server.config import ServerConfig
from server.engine.engine import Engine
from server.engine.structured import GrammarCompiler
from server.errors import EngineError, Overloaded
from server.metrics import Metrics
from spq.sizes import format_bytes

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Phase = Literal["starting", "downloading", "compressing", "loading", "warming_up", "ready", "draining", "failed"]
Report = Callable[[Phase, float, str, float | None], None]  # phase, share done, detail, seconds left
EXPECTED_START_S = 10  # Retry-After while nothing better is known
LOG_EVERY_S = 5.0
CANCEL_S = 5.0  # what a start-up gets to notice that it is not wanted any more


class StartUpCancelled(Exception):
    """Raised by a progress report on the start-up thread once the server is to stop."""


class StartUpError(Exception):
    """The model cannot be served, and the message says all that the operator needs to mend it."""


@dataclass(frozen=True, slots=True)
class Status:
    """A reading for /ready and metrics. `progress` is the share of the current phase that is done."""

    phase: Phase
    detail: str
    progress: float
    elapsed_s: float  # since the process started to start
    eta_s: float | None  # of the current phase
    error: str | None
    phase_seconds: dict[str, float]


@dataclass(slots=True)
class _Clock:
    """Which phase runs since when; seconds of the finished ones."""

    started_s: float = field(default_factory=time.monotonic)
    phase: Phase = "starting"
    phase_started_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.phase_started_s
        self.phase, self.phase_started_s = phase, now


def default_name(model: str) -> str:
    """What clients call a model where no name was given: the last part of its folder or hub id."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model.rsplit("/", 1)[-1]


class Service:
    """Holds what requests need: options, metrics, and once loaded the engine and the tokenizer."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.served_names = config.served_model_names or (default_name(config.model),)
        self.metrics = Metrics(self.served_names[0])
        self.engine: Engine | None = None
        self.tokenizer: Tokenizer | None = None
        self._grammars: GrammarCompiler | None = None
        self.on_failure: Callable[[], None] = lambda: None  # called on the start-up thread
        self._clock = _Clock()
        self._lock = threading.Lock()
        self._detail = ""
        self._progress = 0.0
        self._logged_s = time.monotonic()
        self._eta_s: float | None = None
        self._error: str | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def status(self) -> Status:
        """Where the server stands."""
        with self._lock:
            clock, now = self._clock, time.monotonic()
            phase: Phase = clock.phase
            error = self._error
            if phase == "ready" and self.engine is not None and not self.engine.stats().alive:
                phase, error = "failed", "the engine stopped after an error; see the log"
            return Status(
                phase=phase,
                detail=self._detail,
                progress=self._progress,
                elapsed_s=now - clock.started_s,
                eta_s=self._eta_s,
                error=error,
                phase_seconds=dict(clock.seconds),
            )

    def ready(self) -> tuple[Engine, Tokenizer]:
        """What serves requests. Raises Overloaded while starting, EngineError after a failure."""
        if self.engine is not None and self.tokenizer is not None:
            return self.engine, self.tokenizer
        status = self.status()
        if status.phase == "failed":
            raise EngineError(f"the model could not be loaded: {status.error}")
        raise Overloaded(
            f"the model is not ready: {status.phase} {status.detail}".rstrip() + f", {status.progress:.0%} done",
            retry_after_s=round(status.eta_s) if status.eta_s is not None else EXPECTED_START_S,
            code="model_loading",
        )

    def check_room(self) -> None:
        """Raise Overloaded where one more sequence would find the queue full."""
        if self.engine is not None:
            self.engine.check_room()

    @property
    def grammars(self) -> GrammarCompiler:
        """What compiles schemas and grammars for the model. Raises as `ready` does."""
        engine, tokenizer = self.ready()
        if self._grammars is None:
            info = engine.info
            self._grammars = GrammarCompiler(tokenizer, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids)
        return self._grammars

    def start(self) -> None:
        """Begin start-up in a thread; outputs will be delivered on the running event loop."""
        event_loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(event_loop,), name="start-up", daemon=True)
        self._thread.start()

    async def drain(self) -> None:
        """Unready at once; accepted requests may end within the drain timeout, new ones are refused."""
        if self.status().phase == "draining":
            return
        self._stopping.set()
        self._enter("draining")
        if self.engine is not None:
            await self.engine.drain(self.config.drain_timeout_s)

    def close(self) -> None:
        """Wait a little for a start-up that was cut off, so that it removes its unfinished files."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(CANCEL_S)

    @property
    def is_starting(self) -> bool:
        """Whether the start-up thread still runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, event_loop: asyncio.AbstractEventLoop) -> None:
        try:
            from server import startup  # torch and transformers take seconds to import: the port is open meanwhile

            engine, tokenizer = startup.start_up(self.config, self._report, on_step=self.metrics.step)
        except StartUpCancelled:
            logger.info("start-up was cut off")
        except StartUpError as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("start-up failed")
            self._fail(f"{type(error).__name__}: {error}")
        else:
            if self._stopping.is_set():
                return
            engine.start(event_loop)
            self.tokenizer, self.engine = tokenizer, engine
            self._enter("ready")
            self._announce(engine)

    def _report(self, phase: Phase, progress: float, detail: str = "", eta_s: float | None = None) -> None:
        if self._stopping.is_set():
            raise StartUpCancelled
        with self._lock:
            if phase != self._clock.phase:
                self._clock.enter(phase)
                logger.info("start-up: %s", phase)
            spent = time.monotonic() - self._clock.phase_started_s
            guess = spent / progress * (1 - progress) if progress > 0.05 else None
            self._detail, self._progress, self._eta_s = detail, progress, eta_s if eta_s is not None else guess
            self._log_progress()

    def _log_progress(self) -> None:
        """A line every few seconds of a long phase."""
        now = time.monotonic()
        if now - self._logged_s > LOG_EVERY_S and 0 < self._progress < 1:
            self._logged_s = now
            left = "" if self._eta_s is None else f", {self._eta_s:.0f} s left"
            logger.info("%s: %.0f %% %s%s", self._clock.phase, 100 * self._progress, self._detail, left)

    def _enter(self, phase: Phase) -> None:
        with self._lock:
            if self._clock.phase != "draining":
                self._clock.enter(phase)
                self._detail, self._progress, self._eta_s = "", 1.0, None

    def _fail(self, message: str) -> None:
        logger.error("cannot serve %s: %s", self.config.model, message)
        with self._lock:
            self._error = message
        self._enter("failed")
        self.on_failure()

    def _announce(self, engine: Engine) -> None:
        info = engine.info
        ledger = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in info.ledger.items() if size)
        logger.info("memory on %s: %s", info.device, ledger)
        logger.info(
            "ready: %s, %d tokens of context, %d KV tokens (%s), at most %d sequences, backend %s (%s)",
            ", ".join(self.served_names),
            info.max_model_len,
            info.kv_tokens,
            info.kv_dtype,
            info.max_num_seqs,
            info.backend,
            info.dtype,
        )
