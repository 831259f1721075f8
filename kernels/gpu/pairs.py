"""Matrices and low-rank pairs of integers, int8 or int4, laid out without asking which.

Not the layouts themselves (`layout`, `int4_layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch

from kernels.gpu.configs import MIN_DOT_ROWS, PAD, next_power_of_2
from kernels.gpu.int4_layout import int4_matrix
from kernels.gpu.layout import PackedMatrix, PackedPair, int8_matrix
from kernels.weights import Int4Weight, Int8Weight, LinearWeight, LowRankWeight

PackedWeight = Int8Weight | Int4Weight


def is_packed_pair(weight: LinearWeight) -> TypeGuard[LowRankWeight]:
    """Whether it is a low-rank pair, both factors of integers."""
    return isinstance(weight, LowRankWeight) and all(isinstance(w, PackedWeight) for w in (weight.down, weight.up))


def share_a_kind(weights: Sequence[LinearWeight]) -> bool:
    """Whether all are int8, or all are int4: only those can lie in one matrix."""
    return any(all(isinstance(weight, kind) for weight in weights) for kind in (Int8Weight, Int4Weight))


def packed_matrix(
    weights: Sequence[PackedWeight],
    device: torch.device,
    magic: bool,
    rows: Sequence[int] | None = None,
    width: int | None = None,
) -> PackedMatrix:
    """See `int8_matrix`, which `width` is for, and `int4_matrix`; for the weights `share_a_kind` holds."""
    if isinstance(weights[0], Int8Weight):
        return int8_matrix([w for w in weights if isinstance(w, Int8Weight)], device, magic, rows, width)
    return int4_matrix([w for w in weights if isinstance(w, Int4Weight)], device, rows)


def packed_factors(pair: LowRankWeight) -> tuple[PackedWeight, PackedWeight]:
    """Both factors. Raises ValueError when they disagree in rank or the first one has a bias."""
    down, up = pair.down, pair.up
    assert isinstance(down, PackedWeight) and isinstance(up, PackedWeight)
    if up.shape[1] != pair.rank or down.bias is not None:
        raise ValueError(f"factors {up.shape} and {down.shape} make no low-rank pair without inner bias")
    return down, up


def packed_pair(pair: LowRankWeight, device: torch.device, magic: bool) -> PackedPair:
    """Lay out both factors, for which `is_packed_pair` holds. Raises ValueError as `packed_factors`."""
    down, up = packed_factors(pair)
    return _pair(down, packed_matrix([up], device, magic), device, magic)


def correction(pair: LowRankWeight, device: torch.device, magic: bool) -> PackedPair:
    """As `packed_pair`, for a rank that is often far below 128; see `correction_factors`."""
    return _pair(*correction_factors(pair, device, magic), device, magic)


def correction_factors(pair: LowRankWeight, device: torch.device, magic: bool) -> tuple[PackedWeight, PackedMatrix]:
    """The first factor as it was stored, and the second laid out, ready for an input of its padded width.

    An int8 one is padded to 32 or 64 where that is enough: to 128, a correction of rank 16 of a 4096 x 4096 matrix
    would take 1 MB, an eighth of the matrix in int4. Int4 has steps of 128 inputs, and half the bytes.
    """
    down, up = packed_factors(pair)
    narrow = max(2 * MIN_DOT_ROWS, next_power_of_2(pair.rank))
    second = packed_matrix([up], device, magic, width=narrow if narrow < PAD else None)
    second.in_features = second.width
    return down, second


def _pair(down: PackedWeight, second: PackedMatrix, device: torch.device, magic: bool) -> PackedPair:
    second.in_features = second.width  # it reads what `first` writes, padding included
    return PackedPair(packed_matrix([down], device, magic, [second.width]), second)
