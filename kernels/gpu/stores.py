"""The integers of prepared GPU weights, to be moved: `kernels.stores` for the layouts of this package.

Not the layouts themselves. Launches take addresses when they begin, so moving changes nothing for those under way; a
CUDA graph would keep the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.gpu.head_layout import HeadFactors, HeadProjections
from kernels.gpu.layout import DenseMatrix, PackedMatrix, PackedPair
from kernels.gpu.prepared import Corrected, FusedGateUp, GateUp, Linear, MixedPair, Projections, StackedCorrected
from kernels.layers import Layer


@dataclass(frozen=True, slots=True, eq=False)
class IntegerStore:
    """See kernels.stores.Store. Two owners are views of one memory."""

    owners: tuple[PackedMatrix | HeadFactors, ...]

    @property
    def integers(self) -> Tensor:
        """int8 or uint8, or int16 words of four int4."""
        return self.owners[0].weight

    def move(self, memory: Tensor) -> None:
        """See kernels.stores.Store."""
        for owner in self.owners:
            owner.weight = memory


def layer_stores(layer: Layer) -> list[IntegerStore]:
    """Of all matrices of integers of a layer; float ones have none."""
    return [store for prepared in (layer.qkv, layer.o, layer.gate_up, layer.down) for store in _stores(prepared)]


def _stores(prepared: Linear | Projections | GateUp) -> list[IntegerStore]:
    match prepared:
        case DenseMatrix():
            return []
        case tuple():
            parts: tuple[Linear, ...] = prepared
        case PackedPair() | MixedPair():
            parts = (prepared.first, prepared.second)
        case Corrected():
            parts = (prepared.main, prepared.correction)
        case FusedGateUp():
            parts = (prepared.matrix,)
        case StackedCorrected():
            parts = (prepared.main, prepared.first, *(addition.second for addition in prepared.additions))
        case HeadProjections() if prepared.heads.starts is None:
            return [IntegerStore((prepared.first, prepared.heads))]
        case HeadProjections():
            return [IntegerStore((prepared.first,)), IntegerStore((prepared.heads,))]
        case _:
            return [IntegerStore((prepared,))]
    return [store for part in parts for store in _stores(part)]
