"""Progress of a compression: what a caller is told, and the clock behind it. Not a display (`cli` has one)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run. Raising from the callback that gets it ends the run."""

    stage: str  # "tokenize", "svd", "activations", "write", "recover"
    layer: int
    num_layers: int
    done: float  # 0..1 of the whole
    elapsed_s: float
    eta_s: float | None  # None until the first layer is done
    expected_bytes: int | None = None  # peak memory told before it, once the text is tokenized; see Report


class StageClock:
    """Adds up seconds by stage and reports progress; steps have weights, so that a share of the whole is known."""

    def __init__(self, num_layers: int, total_weight: float, callback: Callable[[Progress], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self.expected_bytes: int | None = None
        self._num_layers = num_layers
        self._total = total_weight
        self._done = 0.0
        self._callback = callback
        self._started_s = time.monotonic()

    @contextmanager
    def stage(self, name: str, layer: int, weight: float) -> Iterator[None]:
        """Time a step of `weight`; the callback hears of its start, and of the end of the whole."""
        self._tell(name, layer)
        begun_s = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun_s
        self._done += weight
        if self._done >= self._total - 1e-6:
            self._tell(name, layer)

    def _tell(self, name: str, layer: int) -> None:
        if self._callback is None:
            return
        done = min(1.0, self._done / self._total)
        elapsed = time.monotonic() - self._started_s
        eta = elapsed / done * (1.0 - done) if done > 0 else None
        self._callback(Progress(name, layer, self._num_layers, done, elapsed, eta, self.expected_bytes))
