"""Between the host and the device: many small columns in one copy there, many results in one wait back.

A copy from pageable memory makes the host wait for the device, and every copy costs a launch. So what a step sends is
packed into one pinned buffer. On the CPU nothing is packed: columns are used where they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

ALIGN = 16  # bytes: Triton compiles a kernel anew for a pointer that is no multiple of 16
_DTYPES = {"q": torch.int64, "i": torch.int32, "d": torch.float64}

Column: TypeAlias = "array[int] | array[float] | Tensor"  # typecodes q, i, d; tensors on the CPU


@dataclass(frozen=True, slots=True)
class Packed:
    """Columns laid one after the other in one buffer."""

    buffer: Tensor  # uint8 [bytes] on the host
    spans: tuple[tuple[torch.dtype, int, int], ...]  # of each column: dtype, first byte, end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The columns, flat, in a copy of the buffer (uint8, at least as long)."""
        return [buffer[begin:end].view(dtype) for dtype, begin, end in self.spans]


def pack(columns: Sequence[Column], *, pinned: bool) -> Packed:
    """Copy the columns into one new host buffer."""
    tensors = [as_tensor(column) for column in columns]
    spans, size = [], 0
    for tensor in tensors:
        spans.append((tensor.dtype, size, size + tensor.nbytes))
        size = -(-(size + tensor.nbytes) // ALIGN) * ALIGN
    packed = Packed(torch.empty(size, dtype=torch.uint8, pin_memory=pinned), tuple(spans))
    for tensor, view in zip(tensors, packed.views(packed.buffer), strict=True):
        view.copy_(tensor)
    return packed


def upload(columns: Sequence[Column], device: torch.device) -> list[Tensor]:
    """The columns on the device, flat, by one copy that the host does not wait for."""
    if device.type == "cpu":
        return [as_tensor(column) for column in columns]
    packed = pack(columns, pinned=device.type == "cuda")
    return packed.views(packed.buffer.to(device, non_blocking=True))


class Download:
    """Copies of tensors to the host, begun at once and waited for later: for them, not for what is launched since."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory, from CUDA
        self._arrival: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrival = torch.cuda.current_stream().record_event()

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies


def as_tensor(column: Column) -> Tensor:
    """The column as a flat tensor over the same memory."""
    if isinstance(column, Tensor):
        return column.flatten()
    dtype = _DTYPES[column.typecode]
    return torch.frombuffer(column, dtype=dtype) if column else torch.empty(0, dtype=dtype)
