"""The arena of two layers that coded layers are decoded into: in host memory for a CPU, on the card for a GPU.

Not the ring that says whose turn a half is (`coded`). A half goes round: `target`, decode, `send`, run, `release`. On a
GPU the host decodes into pinned memory and a copy stream takes that over while kernels read the other half; what waits
for what is written against `Bus`, so that it is tested without a GPU, by one that is as late as it may be.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor


class Arena(Protocol):
    """Two halves, numbered 0 and 1. One caller; threads write to what `target` returned."""

    def target(self, half: int) -> Tensor:
        """uint8 [size] on the host, to decode into; waits until what was there before has been sent."""
        ...

    def memory(self, half: int) -> Tensor:
        """uint8 [size] on the device, where kernels read."""
        ...

    def send(self, half: int, size: int) -> None:
        """Take `size` bytes of `target` to `memory`: kernels begun from now on find them there."""
        ...

    def release(self, half: int) -> None:
        """Kernels begun so far are the last ones that read what was sent."""
        ...

    def drain(self) -> None:
        """Wait for copies and kernels: afterwards the memory may be given up."""
        ...


class HostArena:
    """For kernels that run on the host: layers are decoded where they are read."""

    def __init__(self, size: int) -> None:
        self._halves = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)

    def target(self, half: int) -> Tensor:
        """See Arena."""
        return self._halves[half]

    def memory(self, half: int) -> Tensor:
        """See Arena."""
        return self._halves[half]

    def send(self, half: int, size: int) -> None:
        """Nothing to do."""

    def release(self, half: int) -> None:
        """Nothing to do: a kernel has ended when its call returns."""

    def drain(self) -> None:
        """Nothing to do."""


class Event(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Let the host wait until it is reached."""
        ...


class Bus(Protocol):
    """A device with two queues of work, copies and kernels, that wait for each other only where they are told to."""

    def pinned(self, size: int) -> Tensor:
        """uint8 [size] of host memory that copies read while the host goes on."""
        ...

    def allocate(self, size: int) -> Tensor:
        """uint8 [size] on the device."""
        ...

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Begin to copy from pinned to device memory."""
        ...

    def copied(self) -> Event:
        """Reached when all copies begun so far are done."""
        ...

    def computed(self) -> Event:
        """Reached when all kernels begun so far are done."""
        ...

    def copy_after(self, event: Event) -> None:
        """Copies begun from now on wait for it."""
        ...

    def compute_after(self, event: Event) -> None:
        """Kernels begun from now on wait for it."""
        ...


class StagedArena:
    """For kernels that run on a device behind a bus: layers are decoded into pinned memory and copied over."""

    def __init__(self, size: int, bus: Bus) -> None:
        self._bus = bus
        self._staging = bus.pinned(size), bus.pinned(size)
        self._memory = bus.allocate(size), bus.allocate(size)
        free = bus.computed()  # the allocator may hand out memory that kernels begun before still read
        self._released = [free, free]
        self._sent: list[Event | None] = [None, None]

    def target(self, half: int) -> Tensor:
        """See Arena."""
        sent = self._sent[half]
        if sent is not None:
            sent.synchronize()
        return self._staging[half]

    def memory(self, half: int) -> Tensor:
        """See Arena."""
        return self._memory[half]

    def send(self, half: int, size: int) -> None:
        """See Arena; returns at once."""
        bus = self._bus
        bus.copy_after(self._released[half])
        bus.copy(self._memory[half][:size], self._staging[half][:size])
        self._sent[half] = sent = bus.copied()
        bus.compute_after(sent)

    def release(self, half: int) -> None:
        """See Arena."""
        self._released[half] = self._bus.computed()

    def drain(self) -> None:
        """See Arena."""
        self._bus.copied().synchronize()
        self._bus.computed().synchronize()


class CudaBus:
    """A CUDA device: copies on a stream of their own, kernels on the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> Tensor:
        """See Bus."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def allocate(self, size: int) -> Tensor:
        """See Bus."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """See Bus."""
        with torch.cuda.stream(self._copies):
            to.copy_(source, non_blocking=True)

    def copied(self) -> Event:
        """See Bus."""
        return self._event(self._copies)

    def computed(self) -> Event:
        """See Bus."""
        return self._event(torch.cuda.current_stream(self._device))

    def copy_after(self, event: Event) -> None:
        """See Bus."""
        self._copies.wait_event(cast(torch.cuda.Event, event))

    def compute_after(self, event: Event) -> None:
        """See Bus."""
        torch.cuda.current_stream(self._device).wait_event(cast(torch.cuda.Event, event))

    def _event(self, stream: torch.cuda.Stream) -> Event:
        """Blocking: a host that waits for it sleeps, and leaves the core to a thread that decodes."""
        return cast(Event, stream.record_event(torch.cuda.Event(blocking=True)))  # type: ignore[no-untyped-call]
