"""Four bits of one matrix: a grid of 16 values for each group of inputs of a row, and rounding to the nearest.

Not the storage (`kernels.weights.Int4Weight` says what the integers mean) and not error feedback (`feedback`). The
scale is rounded to float16, as it is stored, before anything is rounded with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights import Int4Weight, pack_int4
from spq.errors import OptionError
from spq.quantize import CHUNK_ELEMENTS

LEVELS = 15
MIDDLE = 8  # the integer that means 0 where there is no zero point
MIN_SCALE = 2.0**-24  # smallest positive float16: no group divides by zero
MAX_SCALE = 65504.0
# Shares of the range tried by the search: all of it, 15/14 (a symmetric grid that reaches +max), then ever less.
SHRINK = (1.0, 15 / 14, *(1.0 - step / 40 for step in range(1, 21)))


@dataclass(slots=True)
class Grid:
    """The 16 values of each group: (0..15 - zero) * scale."""

    scale: Tensor  # float16 [out, groups], > 0
    zero: Tensor  # uint8 [out, groups], 0..15
    group: int

    def round(self, weight: Tensor) -> Tensor:
        """weight [out, in] -> the nearest q uint8 [out, in] of the grid, ties to even."""
        scale, zero = (
            part.to(weight.dtype).repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]
            for part in (self.scale, self.zero)
        )
        return (weight / scale).round_().add_(zero).clamp_(0, LEVELS).to(torch.uint8)


def check_group(group: int) -> None:
    """Raises OptionError for a group that the layout does not have."""
    if group < 2 or group % 2:
        raise OptionError(f"group {group}: groups of 4-bit weights hold an even number of inputs, 2 or more")


def fit_grid(
    weight: Tensor, group: int, symmetric: bool, *, search: bool = False, importance: Tensor | None = None
) -> Grid:
    """The grid of weight [out, in] (float32 or float64), groups of `group` inputs, the last one may be shorter.

    Symmetric: zero 8, scale 2 max|w| / 15. Otherwise scale (max - min) / 15 with 0 inside the range, and the zero
    point is the integer nearest to 0's place. A group of one value c gets the scale |c|, so that a c which float16 can
    hold (0 among them) is kept exactly. With `search` the range is shrunk by the factor of SHRINK that makes
    sum_k importance_k (w_k - w~_k)^2 least; importance [in] >= 0 is the diagonal of the inputs' second moment, or
    None for 1. Raises OptionError where a scale does not fit float16.
    """
    check_group(group)
    rows, columns = weight.shape
    missing = -columns % group
    # the last group is filled up with its last column: neither its range nor its being constant changes
    padded = torch.cat((weight, weight[:, -1:].expand(rows, missing)), dim=1).view(rows, -1, group)
    low, high = padded.amin(dim=2), padded.amax(dim=2)
    top = torch.maximum(high.abs(), low.abs())
    if not bool((top * 2 / LEVELS <= MAX_SCALE).all()):
        raise OptionError(
            f"a weight of {float(top.max()):.3g} is not finite or too large for 4 bits with a float16 scale; "
            "store this matrix in 8 bits"
        )
    best = _grid(low, high, symmetric, 1.0)
    if search:
        share = torch.ones(columns) if importance is None else importance
        share = torch.nn.functional.pad(share.to(weight), (0, missing)).view(-1, group)
        least = _error(padded, best, share)
        for factor in SHRINK[1:]:
            other = _grid(low, high, symmetric, factor)
            error = _error(padded, other, share)
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, other[0], best[0]), torch.where(better, other[1], best[1]))
    single = (low == high) & (top <= MAX_SCALE)
    scale = torch.where(single, _half(top), best[0])
    # q - zero is +1 or -1 for a single value: 9 or 7 - 8, and 1 - 0 or 0 - 1
    zero = best[1] if symmetric else torch.where(single, (high < 0).to(best[1].dtype), best[1])
    return Grid(scale.to(torch.float16), zero.to(torch.uint8), group)


def _half(scale: Tensor) -> Tensor:
    """Rounded to float16, in its own dtype."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(scale.dtype)


def _grid(low: Tensor, high: Tensor, symmetric: bool, factor: float) -> tuple[Tensor, Tensor]:
    """(scale, zero) [out, groups] for `factor` of the range low..high."""
    if symmetric:
        scale = _half(torch.maximum(high, -low) * (2 * factor / LEVELS))
        return scale, torch.full_like(scale, MIDDLE)
    low, high = low.clamp_max(0.0) * factor, high.clamp_min(0.0) * factor
    scale = _half((high - low) / LEVELS)
    return scale, (-low / scale).round_().clamp_(0, LEVELS)


def _error(padded: Tensor, grid: tuple[Tensor, Tensor], share: Tensor) -> Tensor:
    """Weighted squared rounding error [out, groups] of padded [out, groups, group]."""
    scale, zero = grid[0][..., None], grid[1][..., None]
    off = (padded / scale).round_().add_(zero).clamp_(0, LEVELS).sub_(zero).mul_(scale).sub_(padded)
    return off.square_().mul_(share).sum(dim=2)


def quantize4(
    weight: Tensor,
    group: int = 128,
    symmetric: bool = True,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    bias: Tensor | None = None,
) -> Int4Weight:
    """Round-to-nearest int4 of weight [out, in] (any float dtype) on `fit_grid`'s grid; the bias is passed through.

    The result is on the CPU. Raises OptionError for an odd group or a scale beyond float16.
    """
    return quantize4_streamed(
        lambda start, stop: weight[start:stop],
        weight.shape,
        group,
        symmetric,
        search=search,
        importance=importance,
        bias=bias,
    )


def quantize4_streamed(
    read_rows: Callable[[int, int], Tensor],
    shape: Sequence[int],
    group: int = 128,
    symmetric: bool = True,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    bias: Tensor | None = None,
) -> Int4Weight:
    """`quantize4` of a matrix [out, in] that is handed out by row ranges, so that no float32 copy of it is made."""
    check_group(group)
    rows, columns = shape
    groups = -(-columns // group)
    qweight = torch.empty((rows, -(-columns // 2)), dtype=torch.uint8)
    scale = torch.empty((rows, groups), dtype=torch.float16)
    zero = None if symmetric else torch.empty((rows, groups), dtype=torch.uint8)
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        span = slice(start, min(start + step, rows))
        piece = read_rows(span.start, span.stop).float()
        grid = fit_grid(piece, group, symmetric, search=search, importance=importance)
        qweight[span] = pack_int4(grid.round(piece)).cpu()
        scale[span] = grid.scale.cpu()
        if zero is not None:
            zero[span] = grid.zero.cpu()
    return Int4Weight(qweight, scale, zero, group, columns, bias)
