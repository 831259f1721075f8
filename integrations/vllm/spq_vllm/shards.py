"""Which part of a matrix each rank of tensor parallelism holds, as a weight of its own.

Not vLLM's and not loading: weights in, weights out. A matrix is split by rows (its outputs: q, k, v, gate, up, the
vocabulary) or by columns (its inputs: o, down; the ranks' products are then summed). Of a factor pair the factor that
has the split dimension is split, the other is whole on every rank: up (down x) summed over ranks needs no exchange of
its own, because the product is linear in down.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight

Cut = tuple[int, int]  # start, stop
WIDTH_MULTIPLE = 32  # of the neurons of all ranks but the last


def even_cut(size: int, rank: int, ranks: int) -> Cut:
    """The part of `size` of a rank where all parts are equal. Raises ValueError where they cannot be."""
    if size % ranks:
        raise ValueError(f"{size} cannot be split into {ranks} equal parts; use a tensor parallel size that divides it")
    part = size // ranks
    return rank * part, (rank + 1) * part


def head_cut(num_heads: int, head_dim: int, rank: int, ranks: int) -> Cut:
    """Rows of the heads of a rank; where there are fewer heads than ranks, as of keys, several ranks have the same.

    Raises ValueError where heads do not divide ranks, nor ranks heads.
    """
    if num_heads < ranks:
        if ranks % num_heads:
            raise ValueError(f"{num_heads} heads cannot be shared out among {ranks} ranks")
        rank, ranks = rank // (ranks // num_heads), num_heads
    start, stop = even_cut(num_heads, rank, ranks)
    return start * head_dim, stop * head_dim


def width_cut(width: int, rank: int, ranks: int, group: int | None) -> Cut:
    """Neurons of a rank: any width can be split, into parts that begin at whole groups of int4 inputs where it has
    these, else at multiples of 32. Raises ValueError for fewer neurons than twice the ranks."""
    if width < 2 * ranks:
        raise ValueError(f"an MLP of {width} neurons is too narrow for {ranks} ranks")
    for multiple in (group or WIDTH_MULTIPLE, 2):
        if width >= multiple * ranks:
            break
    bounds = [width * r // ranks // multiple * multiple for r in range(ranks)] + [width]
    return bounds[rank], bounds[rank + 1]


def take_rows(weight: LinearWeight, cut: Cut) -> LinearWeight:
    """The outputs of a cut; tensors of a part are copies, so the whole can go."""
    if isinstance(weight, LowRankWeight):
        return LowRankWeight(weight.down, _leaf_rows(weight.up, cut))
    if isinstance(weight, CorrectedWeight):
        pair = weight.correction
        return CorrectedWeight(_leaf_rows(weight.main, cut), LowRankWeight(pair.down, _leaf_rows(pair.up, cut)))
    return _leaf_rows(weight, cut)


def take_columns(weight: LinearWeight, cut: Cut, with_bias: bool) -> LinearWeight:
    """The inputs of a cut; the bias belongs to one rank alone, because products are summed."""
    if isinstance(weight, LowRankWeight):
        up = weight.up if with_bias else replace(weight.up, bias=None)
        return LowRankWeight(_leaf_columns(weight.down, cut, False), up)
    if isinstance(weight, CorrectedWeight):
        pair = weight.correction
        main = _leaf_columns(weight.main, cut, with_bias)
        return CorrectedWeight(main, LowRankWeight(_leaf_columns(pair.down, cut, False), pair.up))
    return _leaf_columns(weight, cut, with_bias)


def take_table(table: Leaf, cut: Cut, rows: int) -> Leaf:
    """Rows of a vocabulary without bias, filled up to `rows` with rows of zeros."""
    start, stop = min(cut[0], table.shape[0]), min(cut[1], table.shape[0])
    part = _leaf_rows(table, (start, stop))
    missing = rows - part.shape[0]
    if not missing:
        return part
    if isinstance(part, DenseWeight):
        return DenseWeight(_pad(part.weight, missing))
    if isinstance(part, Int8Weight):
        return Int8Weight(_pad(part.qweight, missing), _pad(part.scale, missing))
    zero = None if part.zero is None else _pad(part.zero, missing)
    return replace(part, qweight=_pad(part.qweight, missing), scale=_pad(part.scale, missing), zero=zero)


def _pad(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(rows, *tensor.shape[1:])))


def _leaf_rows(leaf: Leaf, cut: Cut) -> Leaf:
    rows = leaf.shape[0]
    if cut == (0, rows):
        return leaf
    parts = {
        name: tensor[cut[0] : cut[1]].clone()
        for name in ("weight", "qweight", "scale", "zero", "bias")
        if (tensor := getattr(leaf, name, None)) is not None
    }
    return replace(leaf, **parts)


def _leaf_columns(leaf: Leaf, cut: Cut, with_bias: bool) -> Leaf:
    start, stop = cut
    bias = leaf.bias if with_bias else None
    if cut == (0, leaf.shape[1]):
        return replace(leaf, bias=bias)
    if isinstance(leaf, DenseWeight):
        return DenseWeight(leaf.weight[:, start:stop].contiguous(), bias)
    if isinstance(leaf, Int8Weight):
        return Int8Weight(leaf.qweight[:, start:stop].contiguous(), leaf.scale, bias)
    return _int4_columns(leaf, cut, bias)


def _int4_columns(leaf: Int4Weight, cut: Cut, bias: Tensor | None) -> Int4Weight:
    """Groups that the cut goes through become smaller ones with the same scale: exact, at 2 or 3 bytes for each."""
    start, stop = cut
    if start % 2:
        raise ValueError(f"int4 columns from {start} on: they begin in the middle of a byte")
    group = gcd(leaf.group, start)
    spread = leaf.group // group
    groups = slice(start // group, -(-stop // group))

    def part(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(spread, dim=1)[:, groups].contiguous()

    qweight = leaf.qweight[:, start // 2 : -(-stop // 2)].contiguous()
    if stop % 2:  # the half behind the last input means nothing and is 0
        qweight[:, -1] &= 15
    zero = None if leaf.zero is None else part(leaf.zero)
    return Int4Weight(qweight, part(leaf.scale), zero, group, stop - start, bias)
