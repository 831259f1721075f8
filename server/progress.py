"""Which phase the server is in, since when, and how far a start has come; a line in the log now and then.

Not the start itself (`server.loader` runs it), nor what follows from a phase (`server.lifecycle`). For any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

Phase = Literal[
    "starting", "downloading", "compressing", "loading", "warming_up",  # a start
    "ready",
    "sleeping",  # the model was dropped, and a request brings it back
    "drained",  # it was dropped, and only the operator brings it back
    "draining",
    "failed",
]  # fmt: skip
STARTING: tuple[Phase, ...] = ("starting", "downloading", "compressing", "loading", "warming_up")
Report = Callable[[Phase, float, str, float | None], None]  # phase, share done, detail, seconds left
LOG_EVERY_S = 5.0


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
    phase_seconds: dict[str, float]  # of the last start, the phases that are over
    accepts: bool = False  # requests are served now, or wait for a model that is on its way back


class Progress:
    """The phase and its progress. The last phase, once `close` was called, is draining."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started_s = self._phase_started_s = self._logged_s = time.monotonic()
        self._phase: Phase = "starting"
        self._seconds: dict[str, float] = {}
        self._detail = ""
        self._progress = 0.0
        self._eta_s: float | None = None
        self._error: str | None = None
        self._closed = False

    @property
    def phase(self) -> Phase:
        """The phase now."""
        return self._phase

    def status(self) -> Status:
        """A reading; `accepts` is left to the caller."""
        with self._lock:
            return Status(
                phase=self._phase,
                detail=self._detail,
                progress=self._progress,
                elapsed_s=time.monotonic() - self._started_s,
                eta_s=self._eta_s,
                error=self._error,
                phase_seconds=dict(self._seconds),
            )

    def begin(self, phase: Phase) -> None:
        """A start begins: what earlier ones took is forgotten."""
        with self._lock:
            self._enter(phase)
            self._seconds, self._error = {}, None
            self._progress = 0.0

    def enter(self, phase: Phase, error: str | None = None) -> None:
        """Go to a phase that has no parts."""
        with self._lock:
            self._enter(phase)
            self._error = error

    def close(self) -> None:
        """The server ends: no other phase follows."""
        with self._lock:
            self._enter("draining")
            self._closed = True

    def report(self, phase: Phase, progress: float, detail: str = "", eta_s: float | None = None) -> None:
        """How far a phase of a start is; `progress` in 0..1."""
        with self._lock:
            if self._closed:
                return
            if phase != self._phase:
                self._enter(phase)
                logger.info("start-up: %s", phase)
            spent = time.monotonic() - self._phase_started_s
            guess = spent / progress * (1 - progress) if progress > 0.05 else None
            self._detail, self._progress, self._eta_s = detail, progress, eta_s if eta_s is not None else guess
            self._log()

    def _enter(self, phase: Phase) -> None:
        if self._closed:
            return
        now = time.monotonic()
        if self._phase in STARTING:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._phase_started_s
        self._phase, self._phase_started_s = phase, now
        self._detail, self._progress, self._eta_s = "", 1.0, None

    def _log(self) -> None:
        """A line every few seconds of a long phase."""
        now = time.monotonic()
        if now - self._logged_s > LOG_EVERY_S and 0 < self._progress < 1:
            self._logged_s = now
            left = "" if self._eta_s is None else f", {self._eta_s:.0f} s left"
            logger.info("%s: %.0f %% %s%s", self._phase, 100 * self._progress, self._detail, left)
