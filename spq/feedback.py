"""Rounding with error feedback: what one column loses is made up for by the columns that are still to be rounded.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, equation 2 and algorithm 1): with H the second moment of the inputs and U
the upper Cholesky factor of H^-1 (H^-1 = U^T U), column j is rounded, its error e = (w_j - q_j) / U_jj is taken from
every column k behind it as e U_jk. Same grids and storage as `quantize` and `quantize4`; only the integers differ.
Not the moments (`moments`).

Beyond the paper: a row that feedback did not help (it is greedy) keeps its round-to-nearest integers, so that no
row's output error on these inputs is above round-to-nearest's. A matrix of at most 2^20 elements is done in float64,
larger ones in float32 with the factorisation of H in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kernels.weights import Int4Weight, Int8Weight, pack_int4
from spq.errors import CalibrationError
from spq.quantize import LEVELS, quantize_with, row_scales
from spq.quantize4 import Grid, check_group, fit_grid
from spq.whiten import checked

BLOCK = 128  # columns whose feedback is applied at once, outside the block in one product
DAMPING = 0.01  # of the mean diagonal of H
WIDE_ELEMENTS = 1 << 20
LEAST_GAIN = 1e-5  # of a row's error


def feedback_int8(
    weight: Tensor,
    second: Tensor,
    *,
    per_channel: bool = True,
    order: bool = False,
    damping: float = DAMPING,
    bias: Tensor | None = None,
) -> Int8Weight:
    """Symmetric int8 of weight [out, in] (any float dtype) with `quantize`'s scales and error feedback.

    second: [in, in], float32 or float64. order: columns go by falling diagonal of it, the stored order stays. The
    result is on the CPU, the bias is passed through. Memory: 4 copies of the weight in float32 and 3 of `second` in
    float64. Raises CalibrationError for a moment that is not finite or has large negative eigenvalues.
    """
    work = _working(weight)
    scale = row_scales(weight, per_channel)
    rounder = _Rows(scale.to(work.dtype), torch.empty(work.T.shape, dtype=torch.int8, device=work.device))
    second = checked(second, work.device)
    _feed_back(work, second, rounder, order, damping)
    fed, nearest = rounder.found.T, quantize_with(weight, scale)
    wide = scale[:, None].to(work.dtype)
    keep = _worse(work, fed * wide, nearest * wide, second)
    return Int8Weight(torch.where(keep[:, None], nearest, fed).contiguous().cpu(), scale.cpu(), bias)


def feedback_int4(
    weight: Tensor,
    second: Tensor,
    group: int = 128,
    symmetric: bool = True,
    *,
    search: bool = False,
    order: bool = False,
    damping: float = DAMPING,
    bias: Tensor | None = None,
) -> Int4Weight:
    """int4 groups of weight [out, in] (any float dtype) with error feedback, on `fit_grid`'s grids.

    A grid is fitted to its group when the columns before it are done, to what they left. With `order` columns go by
    falling diagonal of `second`: the layout keeps no permutation, so all grids are fitted first, to the weights as
    they were (static groups). search: clipping, weighted by the diagonal of `second`. Otherwise as `feedback_int8`;
    raises OptionError as `fit_grid`.
    """
    check_group(group)
    work = _working(weight)
    second = checked(second, work.device)
    importance = second.diagonal() if search else None
    plain = fit_grid(work, group, symmetric, search=search, importance=importance)
    rounder = _Groups(
        Grid(plain.scale.clone(), plain.zero.clone(), group),
        torch.empty(work.T.shape, dtype=torch.uint8, device=work.device),
        symmetric,
        importance if search else None,
        search,
        refit=not order,
    )
    _feed_back(work, second, rounder, order, damping)
    fed, nearest = rounder.found.T, plain.round(work)
    keep = _worse(work, _values(fed, rounder.grid, work.dtype), _values(nearest, plain, work.dtype), second)[:, None]
    q = torch.where(keep, nearest, fed)
    scale = torch.where(keep, plain.scale, rounder.grid.scale)
    zero = None if symmetric else torch.where(keep, plain.zero, rounder.grid.zero).cpu()
    return Int4Weight(pack_int4(q).cpu(), scale.cpu(), zero, group, work.shape[1], bias)


class _Rounder(Protocol):
    block: int  # columns per block; a multiple of what shares a grid

    def round(self, column: int, rest: Tensor) -> Tensor:
        """Store the integers of `column`; returns their values [out]. rest [1.., out]: it and the block behind it."""


@dataclass(slots=True)
class _Rows:
    """int8 with one scale per row."""

    scale: Tensor  # [out], in the working dtype
    found: Tensor  # int8 [in, out]
    block: int = BLOCK

    def round(self, column: int, rest: Tensor) -> Tensor:
        q = (rest[0] / self.scale).round_().clamp_(-LEVELS, LEVELS)
        self.found[column] = q.to(torch.int8)
        return q * self.scale


@dataclass(slots=True)
class _Groups:
    """int4 with a grid per group, fitted when its first column comes (`refit`) or before."""

    grid: Grid
    found: Tensor  # uint8 [in, out]
    symmetric: bool
    importance: Tensor | None
    search: bool
    refit: bool
    block: int = field(init=False)

    def __post_init__(self) -> None:
        group = self.grid.group
        self.block = group * max(1, BLOCK // group) if self.refit else BLOCK

    def round(self, column: int, rest: Tensor) -> Tensor:
        number, first = divmod(column, self.grid.group)
        if self.refit and first == 0:
            columns = rest[: self.grid.group].T
            share = None if self.importance is None else self.importance[column : column + columns.shape[1]]
            fitted = fit_grid(columns, self.grid.group, self.symmetric, search=self.search, importance=share)
            self.grid.scale[:, number], self.grid.zero[:, number] = fitted.scale[:, 0], fitted.zero[:, 0]
        scale, zero = self.grid.scale[:, number].to(rest.dtype), self.grid.zero[:, number].to(rest.dtype)
        q = (rest[0] / scale).round_().add_(zero).clamp_(0, 15)
        self.found[column] = q.to(torch.uint8)
        return (q - zero) * scale


def _working(weight: Tensor) -> Tensor:
    return weight.double() if weight.numel() <= WIDE_ELEMENTS else weight.float()


def _values(q: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale [out, in] of q uint8 [out, in]."""
    scale, zero = (
        part.to(dtype).repeat_interleave(grid.group, dim=1)[:, : q.shape[1]] for part in (grid.scale, grid.zero)
    )
    return (q.to(dtype) - zero) * scale


def _worse(weight: Tensor, fed: Tensor, nearest: Tensor, second: Tensor) -> Tensor:
    """bool [out]: rows whose output error with feedback is not below that of rounding to nearest (by more than the
    rounding of a tie)."""
    metric = second.to(weight.dtype)
    fed_off, nearest_off = fed - weight, nearest - weight
    fed_error = ((fed_off @ metric) * fed_off).sum(dim=1)
    return fed_error >= ((nearest_off @ metric) * nearest_off).sum(dim=1) * (1 - LEAST_GAIN)


def _feed_back(weight: Tensor, second: Tensor, rounder: _Rounder, order: bool, damping: float) -> None:
    """Give every column of weight [out, in], compensated, to the rounder. The weight itself is left alone."""
    count = weight.shape[1]
    columns = torch.arange(count, device=weight.device)
    if order:
        columns = second.diagonal().argsort(descending=True, stable=True)
        second = second[columns][:, columns]
    upper = _inverse_factor(second, damping).to(weight.dtype)
    work = weight.T[columns].contiguous()  # [in, out]: a column is contiguous
    places = columns.tolist()
    for start in range(0, count, rounder.block):
        stop = min(start + rounder.block, count)
        piece, errors = work[start:stop], torch.empty_like(work[start:stop])
        local = upper[start:stop, start:stop]
        pivots = local.diagonal().tolist()
        for i in range(stop - start):
            rounded = rounder.round(places[start + i], piece[i:])
            torch.sub(piece[i], rounded, out=errors[i]).div_(pivots[i])
            piece[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)


def _inverse_factor(second: Tensor, damping: float) -> Tensor:
    """U float64 [n, n], upper, with U^T U = (second + damping)^-1.

    Of the reversed matrix the lower Cholesky factor, reversed back, is R upper with R R^T = second; U is R^-1. One
    factorisation and one triangular solve, where inverting and factorising again takes three. Channels without
    input are cut loose: nothing is fed to them or by them, they are rounded to nearest. Where the moment is not
    positive definite with its damping, the damping grows tenfold, up to the whole mean diagonal.
    """
    matrix = second.clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal <= 0
    matrix[dead] = 0.0
    matrix[:, dead] = 0.0
    diagonal[dead] = mean if mean > 0 else 1.0
    while True:
        moved = matrix.flip(0, 1)
        moved.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(moved)
        if not failed:
            break
        if damping >= 1.0:
            raise CalibrationError("the second moment of a matrix's inputs has large negative eigenvalues")
        damping = max(10 * damping, 1e-6)
    del matrix, diagonal, moved  # three of these at a time are enough: of down_proj they are the largest there is
    reverse = factor.flip(0, 1).contiguous()
    del factor
    identity = torch.eye(len(reverse), dtype=reverse.dtype, device=reverse.device)
    inverse: Tensor = torch.linalg.solve_triangular(reverse, identity, upper=True)
    return inverse
