"""Weights of one matrix as they are stored: floats, int8 with row scales, int4 with group scales, a low-rank pair of
these, or one of these with a low-rank correction beside it.

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
class Int4Weight:
    """Integers of 4 bits in groups of inputs: w[i, k] = (q[i, k] - zero[i, g]) * scale[i, g] with g = k // group.

    The last group may be shorter. A byte holds an even input in its low half and the next input in its high half; the
    half after an odd number of inputs is 0 and means nothing.
    """

    qweight: Tensor  # uint8 [out, ceil(in / 2)], halves in 0..15
    scale: Tensor  # float16 (as stored) or float32 [out, groups]
    zero: Tensor | None  # uint8 [out, groups], 0..15; None: symmetric, 8 everywhere
    group: int  # inputs of one scale, even
    in_features: int
    bias: Tensor | None = None  # [out]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in (self.qweight, self.scale, self.zero, self.bias) if t is not None)

    def integers(self) -> Tensor:
        """q - zero as int8 [out, in], in -15..15."""
        q = torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1).flatten(1)[:, : self.in_features].to(torch.int8)
        return q - (8 if self.zero is None else self._spread(self.zero).to(torch.int8))

    def dequantize(self) -> Tensor:
        """The matrix as float32 [out, in]."""
        return self.integers().float() * self._spread(self.scale.float())

    def rows(self, index: Tensor | slice) -> Int4Weight:
        """Those rows, without bias."""
        zero = None if self.zero is None else self.zero[index]
        return Int4Weight(self.qweight[index], self.scale[index], zero, self.group, self.in_features)

    def _spread(self, per_group: Tensor) -> Tensor:
        """[out, groups] -> [out, in]."""
        return per_group.repeat_interleave(self.group, dim=1)[:, : self.in_features]


@dataclass(slots=True)
class LowRankWeight:
    """y = up(down(x)): down is [rank, in], up is [out, rank] and carries the bias."""

    down: Leaf
    up: Leaf

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


@dataclass(slots=True)
class CorrectedWeight:
    """y = main(x) + correction(x): what rounding and pruning lost comes back through a pair of small rank."""

    main: Leaf  # carries the bias
    correction: LowRankWeight  # without bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.main.shape

    @property
    def bias(self) -> Tensor | None:
        """[out], kept by the main part."""
        return self.main.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.main.nbytes + self.correction.nbytes

    def dequantize(self) -> Tensor:
        """The sum as float32 [out, in]."""
        return self.main.dequantize() + self.correction.dequantize()


Leaf = DenseWeight | Int8Weight | Int4Weight
LinearWeight = Leaf | LowRankWeight | CorrectedWeight


def pack_int4(q: Tensor) -> Tensor:
    """q uint8 [out, in] in 0..15 -> uint8 [out, ceil(in / 2)], as in Int4Weight."""
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def dequantized(weight: LinearWeight) -> DenseWeight:
    """The same map with one float32 matrix: what an exact implementation would compute with."""
    bias = weight.bias
    return DenseWeight(weight.dequantize(), None if bias is None else bias.to(torch.float32))
