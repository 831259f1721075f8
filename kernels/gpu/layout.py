"""How weights lie in GPU memory: made once at load time, read by the kernels.

Not the stored form (`kernels.weights`): K is padded to a multiple of 128 with zeros, so that the inner loop of a
GEMM needs no mask (a mask on K costs all 16-byte asynchronous copies), and matrices that share an input lie one
after the other, so that one launch serves them. Scales of int8 stay float32, one per row. How int4 is laid out:
`int4_layout`; the heads of q, k and v: `head_layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.gpu.configs import PAD, round_up
from kernels.weights import DenseWeight, Int4Weight, Int8Weight

ZERO_POINT = 128  # stored byte of weight 0 where `magic`


@dataclass(slots=True)
class DenseMatrix:
    """Float weights in the dtype of activations: cuBLAS serves them."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(slots=True)
class Int8Matrix:
    """int8 rows over one input, of one matrix or of several, one after the other."""

    weight: Tensor  # [rows * width]; int8 q, or uint8 q + 128 where `magic`
    scale: Tensor  # float32 [rows]
    bias: Tensor | None  # float32 [rows]
    rows: int
    width: int  # inputs, padded to a multiple of 128
    in_features: int  # inputs before padding
    magic: bool

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.weight.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def part(self, begin: int, end: int) -> Int8Matrix:
        """Rows begin to end, a view."""
        return replace(
            self,
            weight=self.weight[begin * self.width : end * self.width],
            scale=self.scale[begin:end],
            bias=None if self.bias is None else self.bias[begin:end],
            rows=end - begin,
        )


@dataclass(slots=True)
class Int4Matrix:
    """int4 rows over one input, of one matrix or of several, one after the other; see `int4_layout`."""

    weight: Tensor  # int16 [rows * width / 4]: four integers a word
    scale: Tensor  # float16 or float32 [width / group, rows]
    zero: Tensor | None  # uint8 [width / group, rows]; None: 8 everywhere
    bias: Tensor | None  # float32 [rows]
    rows: int
    width: int  # inputs, padded to a multiple of 128
    in_features: int  # inputs before padding
    group: int  # inputs of one scale: 16, 32, 64 or 128

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.zero, self.bias) if t is not None)


PackedMatrix = Int8Matrix | Int4Matrix


@dataclass(slots=True)
class PackedPair:
    """A low-rank pair; the rows of `first` are padded so that its output is the padded input of `second`."""

    first: PackedMatrix
    second: PackedMatrix

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.first.nbytes + self.second.nbytes


def packed_constants(matrix: PackedMatrix) -> tuple[int, Tensor | None, bool]:
    """(group, zero points, magic) as the kernels take them; group 0 means int8."""
    if isinstance(matrix, Int4Matrix):
        return matrix.group, matrix.zero, False
    return 0, None, matrix.magic


def dense_matrix(weight: DenseWeight, device: torch.device, dtype: torch.dtype) -> DenseMatrix:
    """Move to the device in the dtype of activations. Raises ValueError when the bias does not fit."""
    check_vector("bias", weight.bias, weight.shape[0])
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return DenseMatrix(weight.weight.to(device, dtype).contiguous(), bias)


def int8_matrix(
    weights: Sequence[Int8Weight],
    device: torch.device,
    magic: bool,
    rows: Sequence[int] | None = None,
    width: int | None = None,
) -> Int8Matrix:
    """Lay out matrices [out, in] of one input, padded to `rows` of each (with scale 0: they give zeros) and to `width`,
    by default the next multiple of 128.

    Raises ValueError when a weight is not int8 or its scale or bias does not have one entry per row.
    """
    rows = rows or [weight.shape[0] for weight in weights]
    width = width or round_up(weights[0].shape[1], PAD)
    blocks, scales = [], []
    for weight, padded_rows in zip(weights, rows, strict=True):
        out_features, in_features = weight.shape
        if weight.qweight.dtype != torch.int8:
            raise ValueError(f"qweight is {weight.qweight.dtype}; int8 is needed")
        check_vector("scale", weight.scale, out_features)
        block = torch.zeros(padded_rows, width, dtype=torch.int8, device=device)
        block[:out_features, :in_features] = weight.qweight.to(device)
        blocks.append(block)
        scales.append(padded(weight.scale, padded_rows, device))
    stacked = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    if magic:
        stacked = stacked.view(torch.uint8).bitwise_xor_(ZERO_POINT)  # q + 128 for q in [-128, 127]
    return Int8Matrix(
        weight=stacked.view(-1),
        scale=torch.cat(scales),
        bias=stacked_bias(weights, rows, device),
        rows=stacked.shape[0],
        width=stacked.shape[1],
        in_features=weights[0].shape[1],
        magic=magic,
    )


def stacked_bias(
    weights: Sequence[Int8Weight | Int4Weight], rows: Sequence[int], device: torch.device
) -> Tensor | None:
    """float32, one entry per (padded) row of all weights; None where none has a bias. Raises ValueError as above."""
    if all(weight.bias is None for weight in weights):
        return None
    parts = []
    for weight, padded_rows in zip(weights, rows, strict=True):
        out_features = weight.shape[0]
        check_vector("bias", weight.bias, out_features)
        bias = torch.zeros(out_features) if weight.bias is None else weight.bias
        parts.append(padded(bias, padded_rows, device))
    return torch.cat(parts)


def padded(vector: Tensor, length: int, device: torch.device) -> Tensor:
    """float32 [length], zeros past the end of the vector."""
    out = torch.zeros(length, dtype=torch.float32, device=device)
    out[: vector.shape[0]] = vector.to(device, torch.float32)
    return out


def check_vector(name: str, vector: Tensor | None, length: int) -> None:
    """Raises ValueError unless the vector is [length] or None."""
    if vector is not None and tuple(vector.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; [{length}] is needed, one entry per output row")
