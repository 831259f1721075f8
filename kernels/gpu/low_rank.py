"""y = up(down(x)) with int8 factors, and the three projections of attention input in two grouped launches.

Two launches, not one: a single kernel would either recompute the first product in every tile of the second (its
weights read again 32 times at 4096 x 4096, rank 1024), add up partial sums in no fixed order, or need a barrier
over the whole grid. The first product stays in the L2 cache between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.int8_linear import int8_linear, int8_linear_chained, split_columns
from kernels.gpu.layout import Int8Matrices, int8_matrices
from kernels.weights import Int8Weight, LinearWeight, LowRankWeight


@dataclass(slots=True)
class Int8Group:
    """Projections of one input, each one int8 matrix or an int8 pair; a plain pair is a group of one.

    `first` holds the first factors of the pairs, then the plain matrices; `second` the second factors. Pairs stand
    first, so that what they write starts at multiples of 128.
    """

    first: Int8Matrices
    second: Int8Matrices | None
    order: tuple[int, ...]  # position i of `first` is projection order[i]

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.first.nbytes + (0 if self.second is None else self.second.nbytes)


def is_int8(weight: LinearWeight) -> bool:
    """Whether every factor of the matrix is int8."""
    if isinstance(weight, LowRankWeight):
        return isinstance(weight.down, Int8Weight) and isinstance(weight.up, Int8Weight)
    return isinstance(weight, Int8Weight)


def int8_group(weights: Sequence[LinearWeight], device: torch.device, magic: bool) -> Int8Group:
    """Lay out up to three projections of one input, for all of which `is_int8` holds.

    Raises ValueError when the factors of a pair disagree in rank, or a first factor has a bias.
    """
    pairs = [i for i, weight in enumerate(weights) if isinstance(weight, LowRankWeight)]
    plain = [i for i in range(len(weights)) if i not in pairs]
    downs, ups, matrices = [], [], []
    for i in pairs:
        pair = weights[i]
        assert isinstance(pair, LowRankWeight)
        assert isinstance(pair.down, Int8Weight) and isinstance(pair.up, Int8Weight)
        if pair.up.shape[1] != pair.rank or pair.down.bias is not None:
            raise ValueError(f"factors {pair.up.shape} and {pair.down.shape} make no low-rank pair without inner bias")
        downs.append(pair.down)
        ups.append(pair.up)
    for i in plain:
        weight = weights[i]
        assert isinstance(weight, Int8Weight)
        matrices.append(weight)
    first = [int8_matrices(downs, device, magic, pad_rows=True)] if downs else []
    first += [int8_matrices(matrices, device, magic)] if matrices else []
    second = int8_matrices(ups, device, magic) if ups else None
    return Int8Group(_concatenated(first), second, tuple(pairs + plain))


def grouped_linear(x: Tensor, group: Int8Group, out_dtype: torch.dtype) -> list[Tensor]:
    """x [T, in] -> [T, out] of every projection, in the order they were given."""
    num_rows = x.shape[0]
    flat = int8_linear(x, group.first, out_dtype if group.second is None else x.dtype)
    outputs = split_columns(flat, num_rows, group.first.rows)
    if group.second is not None:
        num_pairs = len(group.second.rows)
        starts = tuple(sum(group.first.rows[:i]) for i in range(num_pairs))
        products = int8_linear_chained(flat, num_rows, starts, group.second, out_dtype)
        outputs = split_columns(products, num_rows, group.second.rows) + [y.to(out_dtype) for y in outputs[num_pairs:]]
    return [outputs[group.order.index(i)] for i in range(len(outputs))]


def _concatenated(parts: list[Int8Matrices]) -> Int8Matrices:
    if len(parts) == 1:
        return parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([torch.zeros_like(part.scale) if part.bias is None else part.bias for part in parts])
    return Int8Matrices(
        weight=torch.cat([part.weight for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        bias=bias,
        rows=tuple(rows for part in parts for rows in part.rows),
        widths=tuple(width for part in parts for width in part.widths),
        in_features=tuple(n for part in parts for n in part.in_features),
        magic=parts[0].magic,
    )
