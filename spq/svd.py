"""Low-rank factors of one weight matrix: the rank that keeps a share of its energy, or a reason to leave it whole.

Two metrics. Plain: the SVD of W, as in SPQ (arXiv 2602.18420, section on attention SVD). Whitened: the SVD of W S,
where S S^T is the second moment of the inputs, so that what is dropped is the output error (`whiten`).
One eigendecomposition of the smaller Gram matrix, in float64, gives the whole spectrum and the factors of any rank:
squared singular values are its eigenvalues, and W projected on the leading vectors is the truncated SVD (Eckart and
Young 1936). For grouped key/value matrices it is several times cheaper than an SVD of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spq.config import SigmaPlacement, SPQConfig
from spq.errors import OptionError
from spq.tiles import round_up, tile_multiple
from spq.whiten import Root, checked, square_root

RELEASED_MIN_ELEMENTS = 5000  # the released code leaves smaller matrices whole
RELEASED_MAX_KEPT = 0.8
RELEASED_MIN_REMOVED = 0.1


@dataclass(slots=True)
class Spectrum:
    """Squared singular values of W (or of W S) with the singular vectors of its smaller side."""

    weight: Tensor  # [out, in] float32
    energy: Tensor  # [min(out, in)] float64, descending, >= 0
    basis: Tensor  # [min, min]: left vectors where out <= in, else right ones, in columns; float64 where whitened
    root: Root | None = None  # S, only where whitened and out > in: left vectors need none

    def factors(self, rank: int, sigma: SigmaPlacement) -> tuple[Tensor, Tensor]:
        """(down [rank, in], up [out, rank]) float32, the best rank-`rank` approximation up @ down of W.

        Best in the metric of the spectrum: its error is the sum of energy[rank:]. With U S V^T the SVD of W S it is
        U_r U_r^T W where out <= in (S cancels), else (W S V_r) (V_r^T S^-1), S^-1 by a triangular solve.
        """
        vectors = self.basis[:, :rank]
        weight = self.weight.to(vectors.dtype)
        left = weight.shape[0] <= weight.shape[1]
        if left:
            up, down = vectors, vectors.T @ weight
        elif self.root is None:
            up, down = weight @ vectors, vectors.T
        else:
            up, down = weight @ (self.root.matrix @ vectors), self.root.undo(vectors.T)
        carried: SigmaPlacement = "down" if left else "up"
        # directions without energy have no sigma to move: any positive number leaves the product alone
        top = float(self.energy[0].sqrt()) if self.energy.numel() else 0.0
        root = self.energy[:rank].sqrt().clamp_min(top * torch.finfo(torch.float32).eps if top > 0 else 1.0)
        # how much of sigma `up` has to gain: -1 all leaves it, 0 none, 1 all comes to it
        move = {"down": 0.0, "split": 0.5, "up": 1.0}[sigma] - (0.0 if carried == "down" else 1.0)
        shift = root.to(vectors.dtype) ** move
        return (down / shift[:, None]).float().contiguous(), (up * shift).float().contiguous()


def decompose(weight: Tensor, second: Tensor | None = None) -> Spectrum:
    """Spectrum of weight [out, in] (any float dtype), on its device.

    With `second`, the second moment [in, in] of the inputs or its diagonal [in] (float32 or float64), the spectrum of
    W S (SVD-LLM, arXiv 2403.07378): energy is then output energy per token. Where out > in and `second` is not
    positive definite, the metric is the damped one of `square_root`. Raises CalibrationError for a second moment
    that is not finite.
    """
    wide, root = weight.double(), None
    left = weight.shape[0] <= weight.shape[1]
    if second is None:
        gram = wide @ wide.T if left else wide.T @ wide
    else:
        second = checked(second, weight.device)
        if left:
            gram = (wide * second if second.ndim == 1 else wide @ second) @ wide.T
        else:
            root = square_root(second)
            whitened = wide @ root.matrix
            gram = whitened.T @ whitened
    energy, basis = torch.linalg.eigh(gram)
    basis = basis.flip(1)
    return Spectrum(weight.float(), energy.flip(0).clamp_min(0.0), basis if second is not None else basis.float(), root)


def residual_factors(
    weight: Tensor, second: Tensor | None, rank: int, share: float, sigma: SigmaPlacement = "down"
) -> tuple[Tensor, Tensor]:
    """(down [rank, in], up [out, rank]) float32 of weight [out, in], in two stages, as one pair.

    First the best approximation of rank - round(rank share) in the metric of `second`; then the plain SVD of what it
    left, of the remaining rank: residual compensation (ResSVD, arXiv 2505.20112) with mixed metrics (NSVD, arXiv
    2503.17101). In one metric (`second` None) the stages make up one SVD of the whole rank, by Eckart and Young:
    nothing is gained. Raises OptionError for a share outside 0..1 or a rank outside 1..min(out, in).
    """
    if not 0.0 <= share <= 1.0:
        raise OptionError(f"residual share {share} is not between 0 and 1")
    if not 1 <= rank <= min(weight.shape):
        raise OptionError(f"rank {rank} of a matrix of {weight.shape[0]} x {weight.shape[1]}")
    later = round(rank * share)
    down, up = decompose(weight, second).factors(rank - later, sigma)
    more_down, more_up = decompose(weight.float() - up @ down).factors(later, sigma)
    return torch.cat((down, more_down)), torch.cat((up, more_up), dim=1)


def energy_rank(energy: Tensor, threshold: float) -> int:
    """Smallest rank whose share of the energy (descending, float64) reaches the threshold; 1 for a zero matrix."""
    total = energy.sum()
    if total <= 0:
        return 1
    share = energy.cumsum(0) / total
    found = int(torch.searchsorted(share, torch.tensor(threshold, dtype=share.dtype, device=share.device)))
    return min(found + 1, energy.numel())


@dataclass(frozen=True, slots=True)
class RankChoice:
    """What was decided for one matrix."""

    rank: int | None  # None: stays whole
    energy_rank: int  # smallest rank over the threshold, before any rule
    reason: str


def choose_rank(energy: Tensor, shape: tuple[int, int], bias: bool, itemsize: int, options: SPQConfig) -> RankChoice:
    """The rank of a matrix of `shape` (out, in), by `options.rank_rule`.

    `itemsize` is the bytes of a stored element: 1 means int8, with 4 bytes of scale per row.
    """
    needed = energy_rank(energy, options.variance_threshold)
    if options.rank_rule == "released":
        return _released(needed, shape, bias)
    rows, columns = shape
    small = min(shape)
    rank = round_up(needed, tile_multiple(small, options.rank_multiple), small)
    scales = 4 if itemsize == 1 else 0
    whole = rows * columns * itemsize + rows * scales
    pair = rank * (rows + columns) * itemsize + (rank + rows) * scales
    saving = 1.0 - pair / whole
    if saving <= 0.0 or saving < options.min_saving:
        return RankChoice(None, needed, f"rank {rank} saves {saving:.1%} of the bytes, below {options.min_saving:.0%}")
    return RankChoice(rank, needed, f"rank {rank} saves {saving:.1%} of the bytes")


def _released(needed: int, shape: tuple[int, int], bias: bool) -> RankChoice:
    """The published code's rule: at least a tenth is removed, int() truncates, a kept share above 0.8 or a pair with
    no fewer parameters stays whole."""
    rows, columns = shape
    small = min(shape)
    if rows * columns < RELEASED_MIN_ELEMENTS:
        return RankChoice(None, needed, f"{rows * columns} elements, below {RELEASED_MIN_ELEMENTS}")
    removed = max(RELEASED_MIN_REMOVED, min(1 - needed / small, 1.0))
    rank = max(1, int((1 - removed) * small))
    if rank / small > RELEASED_MAX_KEPT:
        return RankChoice(None, needed, f"rank {rank} keeps more than {RELEASED_MAX_KEPT} of {small}")
    extra = rows if bias else 0
    if rank * (rows + columns) + extra >= rows * columns + extra:
        return RankChoice(None, needed, f"rank {rank} has no fewer parameters")
    return RankChoice(rank, needed, f"rank {rank} has fewer parameters")
