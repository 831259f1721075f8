"""A low-rank pair that gives back what storing a matrix lost, in closed form: y = stored(x) + up(down(x)).

Not training: the pair is the truncated SVD of the error W - W~ in the metric of the inputs. Plain, this is
ZeroQuant-V2's LoRC (arXiv 2303.08302); weighted by how large each input is, SLiM's adapters (arXiv 2410.09615, which
weighs by a mean of |x|; here by the root of E[x^2]); with the whole second moment, the least output error any pair of
the rank can reach (Eckart and Young 1936 on (W - W~) S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kernels.weights import Int8Weight, Leaf, LowRankWeight
from spq.errors import OptionError
from spq.quantize import quantize
from spq.svd import Spectrum, decompose
from spq.whiten import damped

CorrectionMetric = Literal["whitened", "diagonal"]
DAMPING = 0.01  # of the mean diagonal of the second moment: inputs that calibration hardly saw still count


def int8_factor(factor: Tensor) -> Int8Weight:
    """One factor [out, in] as int8 with a scale per row."""
    return quantize(factor, per_channel=True)


def error_spectrum(
    weight: Tensor,
    stored: Tensor,
    second: Tensor,
    *,
    metric: CorrectionMetric = "whitened",
    damping: float = DAMPING,
) -> Spectrum:
    """Spectrum of the error weight - stored, both [out, in], in the metric of second [in, in] (or its diagonal [in]).

    The sum of its energy is the output error (damped), the sum of energy[:rank] what a correction of that rank takes
    away: with it a rank can be chosen before anything is built. "diagonal" reads the diagonal of `second` only.
    Raises OptionError where the shapes differ, CalibrationError for a moment that is not finite.
    """
    if stored.shape != weight.shape:
        raise OptionError(f"a matrix of shape {tuple(weight.shape)} is not what {tuple(stored.shape)} approximates")
    if metric == "diagonal" and second.ndim == 2:
        second = second.diagonal()
    error = weight.float() - stored.to(weight.device).float()
    return decompose(error, damped(second.to(weight.device), damping))


def low_rank_correction(
    spectrum: Spectrum, rank: int, *, store: Callable[[Tensor], Leaf] = int8_factor
) -> LowRankWeight:
    """The correction of `rank` from `error_spectrum`, without bias.

    `store` turns each float32 factor into what is kept of it, e.g. `int8_factor`, or DenseWeight of a float16 copy.
    Singular values are in `down`, where a scale per row absorbs them. `up` is not fitted again to the rounded `down`.
    Raises OptionError for a rank outside 1..min(out, in).
    """
    if not 1 <= rank <= spectrum.energy.numel():
        raise OptionError(f"correction rank {rank} is not between 1 and {spectrum.energy.numel()}")
    down, up = spectrum.factors(rank, "down")
    return LowRankWeight(store(down), store(up))
