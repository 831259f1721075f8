"""Who is inside with the model, and since when nobody is. On the event loop only; knows no engine and no HTTP.

While the door is shut nobody comes in, and those inside leave in their own time. Opening and shutting it, and waiting
before it, are `server.lifecycle`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Door:
    """Counts. `on_idle` is called when nobody has been inside for `idle_s` seconds, if the door is open."""

    def __init__(self, idle_s: float | None = None, on_idle: Callable[[], None] = lambda: None) -> None:
        self.is_open = False
        self.num_inside = 0
        self._idle_s = idle_s
        self._on_idle = on_idle
        self._empty = asyncio.Event()
        self._empty.set()
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Visits may begin; the idle time counts from now."""
        self.is_open = True
        self._watch()

    def shut(self) -> None:
        """No visit may begin."""
        self.is_open = False
        self._watch()

    async def wait_empty(self, timeout_s: float) -> bool:
        """Whether everybody had left within `timeout_s`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def come_in(self) -> None:
        """A visit begins."""
        assert self.is_open
        self.num_inside += 1
        self._empty.clear()
        self._watch()

    def leave(self) -> None:
        """A visit ends."""
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()
            self._watch()

    def _watch(self) -> None:
        """Count the idle time from now, where there is any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle_s is not None and self.is_open and self.num_inside == 0:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._on_idle)


class Visit:
    """The stay of one request, from when it takes the model to its end."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._is_inside = False

    def begin(self) -> None:
        """Come in; nothing where it is inside already. The door must be open."""
        if not self._is_inside:
            self._door.come_in()
            self._is_inside = True

    def end(self) -> None:
        """The request has ended, however it did."""
        if self._is_inside:
            self._is_inside = False
            self._door.leave()
