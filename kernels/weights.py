"""Weights of one matrix as they are stored: floats, int8 with row scales, or a low-rank pair of either.

Not how a back end lays them out (each `Ops.prepare_*` makes its own copy): only what was loaded from a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class DenseWeight:
    """y = x W^T + b in floating point."""

    weight: Tensor  # [out, in], float32 / float16 / bfloat16
    bias: Tensor | None = None  # [out]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dequantize(self) -> Tensor:
        """The matrix as float32 [out, in]."""
        return self.weight.float()


@dataclass(slots=True)
class Int8Weight:
    """y = (x Q^T) * scale + b: symmetric int8 with one scale per output row.

    A per-tensor scale is stored as a constant vector: 4 bytes a row buy one layout for every granularity.
    """

    qweight: Tensor  # int8 [out, in], values in [-127, 127]
    scale: Tensor  # float32 [out]
    bias: Tensor | None = None  # [out]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[0], self.qweight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.qweight.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dequantize(self) -> Tensor:
        """The matrix as float32 [out, in]."""
        return self.qweight.float() * self.scale[:, None]


@dataclass(slots=True)
class LowRankWeight:
    """y = up(down(x)): down is [rank, in], up is [out, rank] and carries the bias."""

    down: DenseWeight | Int8Weight
    up: DenseWeight | Int8Weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension of the pair."""
        return self.down.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """[out], kept by the second factor."""
        return self.up.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.down.nbytes + self.up.nbytes

    def dequantize(self) -> Tensor:
        """The product as float32 [out, in]."""
        return self.up.dequantize() @ self.down.dequantize()


Leaf = DenseWeight | Int8Weight
LinearWeight = DenseWeight | Int8Weight | LowRankWeight


def dequantized(weight: LinearWeight) -> DenseWeight:
    """The same map with one float32 matrix: what an exact implementation would compute with."""
    bias = weight.bias
    return DenseWeight(weight.dequantize(), None if bias is None else bias.to(torch.float32))
