"""A device that is none: copies are done as late as they may be, and the order in which things are begun is checked.

Kernels run at once, on the host. A copy runs when something that waits for it would otherwise go on: what is not
waited for is not there, and staging that is written to too early is copied as it is by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class LateEvent:
    """Reached at once for kernels; for copies when those before it are made."""

    reach: Callable[[], None]
    computed: int  # kernels' queue at the time, where it is of that

    def synchronize(self) -> None:
        self.reach()


@dataclass
class LateBus:
    """See `server.model.arena.Bus`. `ran` is to be called for each layer, with where its integers lie."""

    log: list[str] = field(default_factory=list)
    live_bytes: int = 0  # of device memory
    peak_bytes: int = 0
    _copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # begun, not made
    _done: int = 0
    _clock: int = 0  # layers begun
    _waited: int = 0  # the copies' queue stands behind this many layers
    _last_read: dict[int, int] = field(default_factory=dict)  # layers begun when the memory was read last, by address

    def pinned(self, size: int) -> Tensor:
        return torch.full((size,), 0xAA, dtype=torch.uint8)

    def allocate(self, size: int) -> Tensor:
        memory = np.full(size, 0x55, dtype=np.uint8)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(memory, self._free, size)  # with the last tensor over it
        return torch.from_numpy(memory)

    def _free(self, size: int) -> None:
        self.live_bytes -= size

    def ran(self, address: int) -> None:
        self._clock += 1
        self._last_read[address] = self._clock
        self.log.append("run")

    def copy(self, to: Tensor, source: Tensor) -> None:
        read = self._last_read.get(to.data_ptr(), 0)
        assert self._waited >= read, "a copy was begun that may overwrite what a layer still reads"
        self._copies.append((to, source))
        self.log.append("copy")

    def copied(self) -> LateEvent:
        count = self._done + len(self._copies)
        return LateEvent(lambda: self._make(count), 0)

    def computed(self) -> LateEvent:
        return LateEvent(lambda: None, self._clock)

    def copy_after(self, event: LateEvent) -> None:
        self._waited = max(self._waited, event.computed)

    def compute_after(self, event: LateEvent) -> None:
        event.reach()

    def _make(self, count: int) -> None:
        while self._done < count:
            to, source = self._copies.pop(0)
            to.copy_(source)
            self._done += 1
            self.log.append("arrived")
