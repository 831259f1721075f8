"""Prepared matrices whose integers may lie somewhere else each time: what a back end has to offer for that.

Not who moves them (`server.model.coded`). Scales, zero points and biases stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from kernels.layers import Layer
from kernels.ops import Ops


class Store(Protocol):
    """The integers of one prepared matrix."""

    @property
    def integers(self) -> Tensor:
        """As products read them now, flat, of any integer dtype; on the back end's device."""
        ...

    def move(self, memory: Tensor) -> None:
        """Let products that are begun from now on read from `memory`: flat, same size, dtype and device. It is filled
        by the time that one runs."""
        ...


@runtime_checkable
class MovableOps(Ops, Protocol):
    """A back end whose integers may be moved between steps, and between the layers of one."""

    def stores(self, layer: Layer) -> Sequence[Store]:
        """Of a layer, in an order that depends on its kinds of matrices alone."""
        ...
