"""How far to scale and to prune integers: as far as a loss budget lets, for the matrices behind one input at a time.

Double compression (arXiv 2502.15443) takes one alpha for a model; here each input has its own, with the share of the
integers that are set to zero: the pair that takes the fewest bytes once coded and costs no matrix more output error
than allowed. Errors are relative, tr(D H D^T) / tr(W H W^T) for an error D of W and second moments H of the inputs, and
count the rounding too. Bytes are the entropy of the integers (`scaling.coded_bytes`). Not the doing (`apply`,
`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.weights import Int4Weight, Int8Weight
from spq.errors import OptionError
from spq.moments import output_energy
from spq.scaling import channel_scales, coded_bytes, prune_integers

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FRACTIONS = tuple(step / 20 for step in range(17))  # 0 to 0.8

Rounding = Callable[[str, Tensor], Int8Weight | Int4Weight]  # of a matrix by its name


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store the matrices behind one input."""

    alpha: float
    fraction: float  # of integers pruned
    loss: float  # the largest relative output error of a matrix
    nbytes: int  # once coded, all matrices together


def squeeze(
    weights: Mapping[str, Tensor], second: Tensor, peak: Tensor, rounded: Rounding, *, scaled: bool, budget: float
) -> Candidate:
    """The candidate for weights [out, in] float32 that read the same inputs, whose second moments are second [in, in]
    and largest magnitudes peak [in].

    rounded: how a matrix becomes integers; scaled: whether a norm in front can take 1 / s. Of each alpha the largest
    share within the budget is found by bisection: error grows and bytes shrink with it. Raises OptionError as `choose`.
    """
    energies = [output_energy(weight, second) for weight in weights.values()]
    found: list[Candidate] = []
    for alpha in ALPHAS if scaled else ALPHAS[:1]:
        trial = _Trial(weights, energies, second, peak, rounded, alpha)
        found.append(trial.at(FRACTIONS[0]))
        low, high = 0, len(FRACTIONS) - 1 if found[-1].loss <= budget else 0
        while low < high:
            middle = (low + high + 1) // 2
            candidate = trial.at(FRACTIONS[middle])
            if candidate.loss <= budget:
                found.append(candidate)
                low = middle
            else:
                high = middle - 1
    return choose(found, budget)


class _Trial:
    """Matrices rounded at one alpha."""

    def __init__(
        self, weights: Mapping[str, Tensor], energies: Sequence[float], second: Tensor, peak: Tensor,
        rounded: Rounding, alpha: float,
    ) -> None:  # fmt: skip
        self._weights, self._energies, self._second, self._alpha = list(weights.values()), energies, second, alpha
        self._scales = channel_scales(peak, alpha).to(second.device)
        self._peak = peak.cpu() / self._scales.cpu()
        self._leaves = [rounded(name, weight * self._scales) for name, weight in weights.items()]

    def at(self, fraction: float) -> Candidate:
        """With this share of the integers of each matrix set to zero."""
        loss, nbytes = 0.0, 0
        for weight, energy, leaf in zip(self._weights, self._energies, self._leaves, strict=True):
            pruned = prune_integers(leaf, self._peak, fraction)
            nbytes += coded_bytes(pruned)
            error = weight - pruned.dequantize().to(weight.device) / self._scales
            loss = max(loss, output_energy(error, self._second) / energy if energy > 0 else 0.0)
        return Candidate(self._alpha, fraction, loss, nbytes)


def choose(candidates: Sequence[Candidate], loss_budget: float) -> Candidate:
    """The smallest whose loss is within the budget; of equally small ones the one that loses least.

    Raises OptionError, naming the least loss there is, where none is within.
    """
    within = [c for c in candidates if c.loss <= loss_budget]
    if not within:
        least = min((c.loss for c in candidates), default=float("inf"))
        raise OptionError(
            f"a loss budget of {loss_budget:.4g}, but the least loss of a matrix is {least:.4g}; raise it"
        )
    return min(within, key=lambda c: (c.nbytes, c.loss, c.alpha, c.fraction))
