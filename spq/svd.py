"""Low-rank factors of one weight matrix: the rank that keeps a share of its energy, or a reason to leave it whole.

Not activation-aware (no whitening): the plain SVD of W, as in SPQ (arXiv 2602.18420, section on attention SVD).
One eigendecomposition of the smaller Gram matrix, in float64, gives the whole spectrum and the factors of any rank:
squared singular values are its eigenvalues, and W projected on the leading vectors is the truncated SVD (Eckart and
Young 1936). For grouped key/value matrices it is several times cheaper than an SVD of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spq.config import SigmaPlacement, SPQConfig, round_up, tile_multiple

RELEASED_MIN_ELEMENTS = 5000  # the released code leaves smaller matrices whole
RELEASED_MAX_KEPT = 0.8
RELEASED_MIN_REMOVED = 0.1


@dataclass(slots=True)
class Spectrum:
    """W's squared singular values with the singular vectors of its smaller side."""

    weight: Tensor  # [out, in] float32
    energy: Tensor  # [min(out, in)] float64, descending, >= 0
    basis: Tensor  # [min, min] float32: left vectors where out <= in, else right ones, in columns

    def factors(self, rank: int, sigma: SigmaPlacement) -> tuple[Tensor, Tensor]:
        """(down [rank, in], up [out, rank]) float32, the best rank-`rank` approximation up @ down of W."""
        vectors = self.basis[:, :rank]
        left = self.weight.shape[0] <= self.weight.shape[1]
        up, down = (vectors, vectors.T @ self.weight) if left else (self.weight @ vectors, vectors.T)
        carried: SigmaPlacement = "down" if left else "up"
        root = self.energy[:rank].sqrt().float().clamp_min(torch.finfo(torch.float32).tiny)
        # how much of sigma `up` has to gain: -1 all leaves it, 0 none, 1 all comes to it
        move = {"down": 0.0, "split": 0.5, "up": 1.0}[sigma] - (0.0 if carried == "down" else 1.0)
        shift = root**move
        return (down / shift[:, None]).contiguous(), (up * shift).contiguous()


def decompose(weight: Tensor) -> Spectrum:
    """Spectrum of weight [out, in], on its device."""
    wide = weight.double()
    gram = wide @ wide.T if weight.shape[0] <= weight.shape[1] else wide.T @ wide
    energy, basis = torch.linalg.eigh(gram)
    return Spectrum(weight.float(), energy.flip(0).clamp_min(0.0), basis.flip(1).float())


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
