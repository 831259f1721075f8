"""How weights lie in GPU memory: made once at load time, read by the kernels.

Not the stored form (`kernels.weights`): K is padded to a multiple of 128 with zeros, so that the inner loop of a
GEMM needs no mask (a mask on K costs all 16-byte asynchronous copies), and matrices that share an input lie one
after the other, so that one launch serves them. Scales stay float32, one per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.gpu.configs import PAD, round_up
from kernels.weights import DenseWeight, Int8Weight, LinearWeight, LowRankWeight

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
class Int8Pair:
    """A low-rank pair; the rows of `first` are padded so that its output is the padded input of `second`."""

    first: Int8Matrix
    second: Int8Matrix

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.first.nbytes + self.second.nbytes


@dataclass(slots=True)
class HeadFactors:
    """The matrices in front of q, k and v heads, rows one after the other; widths may differ.

    Either all read the whole input (`starts` is None, one width), or projection i reads columns starts[i] to
    starts[i] + widths[i] of what the first factors made; where its width is 0 that is the projection itself.
    """

    weight: Tensor  # flat, as in Int8Matrix
    scale: Tensor  # float32 [sum of rows]; 1 where the width is 0
    bias: Tensor | None  # float32 [sum of rows]
    rows: tuple[int, int, int]
    widths: tuple[int, int, int]
    starts: tuple[int, int, int] | None
    in_features: int  # columns of x
    magic: bool

    def matrix(self, i: int) -> Int8Matrix:
        """The second factor of projection i, a view."""
        first_row, first = sum(self.rows[:i]), sum(r * w for r, w in zip(self.rows[:i], self.widths[:i], strict=True))
        rows = slice(first_row, first_row + self.rows[i])
        return Int8Matrix(
            weight=self.weight[first : first + self.rows[i] * self.widths[i]],
            scale=self.scale[rows],
            bias=None if self.bias is None else self.bias[rows],
            rows=self.rows[i],
            width=self.widths[i],
            in_features=self.widths[i],
            magic=self.magic,
        )


@dataclass(slots=True)
class HeadProjections:
    """q, k, v, each an int8 matrix or an int8 pair: `first` over the residual stream, then the heads.

    Without pairs the heads read the residual stream themselves, and `first` is the same memory.
    """

    first: Int8Matrix
    heads: HeadFactors

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        heads = self.heads
        own = heads.weight.nbytes + heads.scale.nbytes + (0 if heads.bias is None else heads.bias.nbytes)
        return self.first.nbytes + (0 if heads.starts is None else own)


def dense_matrix(weight: DenseWeight, device: torch.device, dtype: torch.dtype) -> DenseMatrix:
    """Move to the device in the dtype of activations. Raises ValueError when the bias does not fit."""
    _check_vector("bias", weight.bias, weight.shape[0])
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return DenseMatrix(weight.weight.to(device, dtype).contiguous(), bias)


def int8_matrix(
    weights: Sequence[Int8Weight], device: torch.device, magic: bool, pad_rows: Sequence[bool] | None = None
) -> Int8Matrix:
    """Lay out matrices [out, in] of one input; where `pad_rows` out is padded (zero rows with scale 0 give zeros).

    Raises ValueError when a weight is not int8 or its scale or bias does not have one entry per row.
    """
    pads = pad_rows or [False] * len(weights)
    blocks, scales, biases = [], [], []
    for weight, pad in zip(weights, pads, strict=True):
        out_features, in_features = weight.shape
        if weight.qweight.dtype != torch.int8:
            raise ValueError(f"qweight is {weight.qweight.dtype}; int8 is needed")
        _check_vector("scale", weight.scale, out_features)
        _check_vector("bias", weight.bias, out_features)
        rows = round_up(out_features, PAD) if pad else out_features
        block = torch.zeros(rows, round_up(in_features, PAD), dtype=torch.int8, device=device)
        block[:out_features, :in_features] = weight.qweight.to(device)
        blocks.append(block)
        scales.append(_padded(weight.scale, rows, device))
        if any(w.bias is not None for w in weights):
            bias = weight.bias if weight.bias is not None else weight.scale.new_zeros(out_features)
            biases.append(_padded(bias, rows, device))
    stacked = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    if magic:
        stacked = stacked.view(torch.uint8).bitwise_xor_(ZERO_POINT)  # q + 128 for q in [-128, 127]
    return Int8Matrix(
        weight=stacked.view(-1),
        scale=torch.cat(scales),
        bias=torch.cat(biases) if biases else None,
        rows=stacked.shape[0],
        width=stacked.shape[1],
        in_features=weights[0].shape[1],
        magic=magic,
    )


def is_int8(weight: LinearWeight) -> bool:
    """Whether every factor of the matrix is int8."""
    if isinstance(weight, LowRankWeight):
        return isinstance(weight.down, Int8Weight) and isinstance(weight.up, Int8Weight)
    return isinstance(weight, Int8Weight)


def int8_factors(pair: LowRankWeight) -> tuple[Int8Weight, Int8Weight]:
    """Both factors. Raises ValueError when they disagree in rank or the first one has a bias."""
    down, up = pair.down, pair.up
    assert isinstance(down, Int8Weight) and isinstance(up, Int8Weight)
    if up.shape[1] != pair.rank or down.bias is not None:
        raise ValueError(f"factors {up.shape} and {down.shape} make no low-rank pair without inner bias")
    return down, up


def int8_pair(pair: LowRankWeight, device: torch.device, magic: bool) -> Int8Pair:
    """Lay out both factors, for which `is_int8` holds. Raises ValueError as `int8_factors`."""
    down, up = int8_factors(pair)
    first, second = int8_matrix([down], device, magic, [True]), int8_matrix([up], device, magic)
    second.in_features = second.width  # it reads what `first` writes, padding included
    return Int8Pair(first, second)


def head_projections(weights: Sequence[LinearWeight], device: torch.device, magic: bool) -> HeadProjections:
    """Lay out q, k and v, for all of which `is_int8` holds. Raises ValueError as `int8_factors`."""
    pairs = {i: int8_factors(weight) for i, weight in enumerate(weights) if isinstance(weight, LowRankWeight)}
    plain = {i: weight for i, weight in enumerate(weights) if isinstance(weight, Int8Weight)}
    # Pairs stand first, so that what they write starts at multiples of 128.
    firsts = [down for down, _ in pairs.values()] + list(plain.values())
    first = int8_matrix(firsts, device, magic, [True] * len(pairs) + [False] * len(plain))
    rows = _three(weight.shape[0] for weight in weights)
    if not pairs:
        widths = _three([first.width] * 3)
        heads = HeadFactors(first.weight, first.scale, first.bias, rows, widths, None, first.in_features, magic)
        return HeadProjections(first, heads)
    starts, start = {}, 0
    for i, weight in zip([*pairs, *plain], firsts, strict=True):
        starts[i] = start
        start += round_up(weight.shape[0], PAD) if i in pairs else weight.shape[0]
    ups = [int8_matrix([pairs[i][1]], device, magic) if i in pairs else None for i in range(3)]
    scales = [torch.ones(n, device=device) if up is None else up.scale for up, n in zip(ups, rows, strict=True)]
    biases = [
        torch.zeros(n, device=device) if up is None or up.bias is None else up.bias
        for up, n in zip(ups, rows, strict=True)
    ]
    heads = HeadFactors(
        weight=torch.cat([up.weight for up in ups if up is not None]),
        scale=torch.cat(scales),
        bias=torch.cat(biases) if any(up is not None and up.bias is not None for up in ups) else None,
        rows=rows,
        widths=_three(0 if up is None else up.width for up in ups),
        starts=_three(starts[i] for i in range(3)),
        in_features=first.rows,
        magic=magic,
    )
    return HeadProjections(first, heads)


def _three(values: Iterable[int]) -> tuple[int, int, int]:
    a, b, c = values
    return a, b, c


def _padded(vector: Tensor, length: int, device: torch.device) -> Tensor:
    out = torch.zeros(length, dtype=torch.float32, device=device)
    out[: vector.shape[0]] = vector.to(device, torch.float32)
    return out


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and tuple(vector.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; [{length}] is needed, one entry per output row")
