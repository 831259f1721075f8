"""What `TritonOps.prepare_*` return beyond single matrices: which products a weight takes, and which share a launch.

Not the layouts (`layout`, `int4_layout`, `head_layout`) and not the launches (`backend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.gpu.configs import PAD, round_up
from kernels.gpu.head_layout import HeadProjections
from kernels.gpu.layout import DenseMatrix, PackedMatrix, PackedPair
from kernels.gpu.pairs import PackedWeight, correction_factors, is_packed_pair, packed_matrix, share_a_kind
from kernels.weights import CorrectedWeight, LinearWeight

Matrix = DenseMatrix | PackedMatrix


@dataclass(slots=True)
class MixedPair:
    """A low-rank pair of which at least one factor is float: two products one after the other."""

    first: Matrix
    second: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.first.nbytes + self.second.nbytes


@dataclass(slots=True)
class Corrected:
    """A matrix whose product a low-rank pair adds to."""

    main: Matrix
    correction: PackedPair | MixedPair

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.main.nbytes + self.correction.nbytes


@dataclass(slots=True)
class FusedGateUp:
    """Both matrices of the MLP input, of one kind of integers, for one launch."""

    matrix: PackedMatrix  # gate, then up, each padded to a multiple of 128 rows
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.matrix.nbytes


@dataclass(slots=True)
class Addition:
    """The second factor of one correction: reads columns from `start` on of the first factors' output, adds to columns
    from `to` on of the main product."""

    start: int
    to: int
    second: PackedMatrix


@dataclass(slots=True)
class StackedCorrected:
    """Matrices of one input, some with corrections: one launch for all main parts, one for all first factors, one for
    each second factor."""

    main: PackedMatrix
    columns: tuple[int, ...]  # of each matrix in the main product, padding included
    width: int  # of the first matrix without padding
    first: PackedMatrix
    additions: list[Addition]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.main.nbytes + self.first.nbytes + sum(addition.second.nbytes for addition in self.additions)


Linear = Matrix | PackedPair | MixedPair | Corrected
Projections = HeadProjections | StackedCorrected | tuple[Linear, Linear, Linear]
GateUp = FusedGateUp | StackedCorrected | tuple[Linear, Linear]


def check_correction(weight: CorrectedWeight) -> None:
    """Raises ValueError when the correction has another shape."""
    if weight.correction.shape != weight.main.shape:
        raise ValueError(f"a correction {weight.correction.shape} does not fit {weight.main.shape}")


def can_stack(weights: Sequence[LinearWeight]) -> bool:
    """Whether `stacked_corrected` takes them: at least one has a correction, and both the main parts and the first
    factors are integers of one kind."""
    mains = [weight.main if isinstance(weight, CorrectedWeight) else weight for weight in weights]
    pairs = [weight.correction for weight in weights if isinstance(weight, CorrectedWeight)]
    packed = bool(pairs) and all(is_packed_pair(pair) for pair in pairs)
    return packed and share_a_kind(mains) and share_a_kind([pair.down for pair in pairs])


def stacked_corrected(
    weights: Sequence[LinearWeight], device: torch.device, magic: bool, pad_rows: bool
) -> StackedCorrected:
    """Lay out weights for which `can_stack` holds; with `pad_rows` each has a multiple of 128 columns of output.

    Raises ValueError as `check_correction` and `correction_factors`.
    """
    mains = [weight.main if isinstance(weight, CorrectedWeight) else weight for weight in weights]
    columns = [round_up(main.shape[0], PAD) if pad_rows else main.shape[0] for main in mains]
    downs, additions, start = [], [], 0
    for i, weight in enumerate(weights):
        if isinstance(weight, CorrectedWeight):
            check_correction(weight)
            down, second = correction_factors(weight.correction, device, magic)
            downs.append(down)
            additions.append(Addition(start, sum(columns[:i]), second))
            start += second.width
    packed = [main for main in mains if isinstance(main, PackedWeight)]
    return StackedCorrected(
        main=packed_matrix(packed, device, magic, columns),
        columns=tuple(columns),
        width=mains[0].shape[0],
        first=packed_matrix(downs, device, magic, [addition.second.width for addition in additions]),
        additions=additions,
    )
