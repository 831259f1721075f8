"""One float matrix into what its recipe says: factors, rounding, error feedback, correction.

Not which recipe (`rules`, `budget`) and not the order of the layers (`pipeline`). Everything is computed in float32 or
wider on the device of the weight; what is returned is on the CPU as it will be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight
from spq.config import SPQConfig
from spq.correct import error_spectrum, int8_factor, low_rank_correction
from spq.decoder import InputName
from spq.errors import OptionError
from spq.feedback import feedback_int4, feedback_int8
from spq.layout import linear_path
from spq.manifest import Stored
from spq.quantize import GranularityRule, quantize
from spq.quantize4 import quantize4
from spq.recipe import Recipe
from spq.scaling import prune_integers
from spq.svd import Spectrum, decompose, residual_factors

INPUT_OF: dict[str, InputName] = {
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "o",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down",
}  # fmt: skip
Factors = tuple[Tensor, Tensor]  # down [rank, in], up [out, rank], float32


@dataclass(frozen=True, slots=True)
class Applier:
    """The options of a run, bound once."""

    options: SPQConfig
    rule: GranularityRule
    float_dtype: torch.dtype  # of matrices that stay float

    def store(
        self,
        module: str,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        *,
        second: Tensor | None = None,
        channel_max: Tensor | None = None,
        factors: Factors | None = None,
        zeroed: float | None = None,
    ) -> LinearWeight:
        """The stored form of weight [out, in] float32.

        `second` [in, in] is the second moment of its inputs and `channel_max` [in] their largest magnitudes, where
        the options need them; `factors` are taken instead of a new decomposition; `zeroed` is the share of its integers
        to prune, the options' where it is None. Raises SpqError where a matrix cannot be stored.
        """
        share = self.options.integer_pruning if zeroed is None else zeroed
        if recipe.rank is not None:
            down, up = self.factors(weight, recipe.rank, second) if factors is None else factors
            inner = None if second is None else down.to(second) @ second @ down.to(second).T
            first = self._leaf(f"{module}.down", down, None, recipe.stored, second, channel_max, share)
            return LowRankWeight(first, self._leaf(f"{module}.up", up, bias, recipe.stored, inner, None, share))
        main = self._leaf(module, weight, bias, recipe.stored, second, channel_max, share)
        if not recipe.correction:
            return main
        assert second is not None
        lost = error_spectrum(weight, main.dequantize().to(weight.device), second)
        store = int8_factor if self.options.quantize else self._float_factor
        return CorrectedWeight(main, low_rank_correction(lost, recipe.correction, store=store))

    def _float_factor(self, factor: Tensor) -> Leaf:
        return DenseWeight(factor.to("cpu", self.float_dtype))

    def factors(self, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """The pair of a rank by the metric of the options."""
        metric = None if self.options.svd_metric == "plain" else second
        return chosen_factors(decompose(weight, metric), metric, rank, self.options)

    def _leaf(
        self, name: str, weight: Tensor, bias: Tensor | None, stored: Stored, second: Tensor | None,
        channel_max: Tensor | None, share: float,
    ) -> Leaf:  # fmt: skip
        options = self.options
        leaf: Leaf
        try:
            if stored == "dense" or not options.feedback or second is None:
                leaf = self._rounded(name, weight, bias, stored, None if second is None else second.diagonal())
            elif stored == "int8":
                leaf = feedback_int8(weight, second, bias=bias)
            else:
                leaf = feedback_int4(weight, second, options.group, options.symmetric, search=True, bias=bias)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error
        if share == 0 or channel_max is None or isinstance(leaf, DenseWeight):
            return leaf
        return prune_integers(leaf, channel_max.cpu(), share)

    def nearest(self, module: str, weight: Tensor, stored: Stored) -> Int8Weight | Int4Weight:
        """weight [out, in] float32 as integers without feedback: what a trial is judged by."""
        leaf = self._rounded(module, weight, None, stored)
        assert not isinstance(leaf, DenseWeight)
        return leaf

    def _rounded(
        self, name: str, weight: Tensor, bias: Tensor | None, stored: Stored, importance: Tensor | None = None
    ) -> Leaf:
        if stored == "dense":
            return DenseWeight(weight.to("cpu", self.float_dtype), bias)
        if stored == "int8":
            return quantize(weight, self.rule.per_channel(name, (weight.shape[0], weight.shape[1])), bias)
        options = self.options
        return quantize4(weight, options.group, options.symmetric, search=True, importance=importance, bias=bias)


def chosen_factors(spectrum: Spectrum, second: Tensor | None, rank: int, options: SPQConfig) -> Factors:
    """The pair of a rank from a spectrum in the metric of `second`, in two stages where the options ask for it."""
    if options.svd_residual > 0 and second is not None:
        return residual_factors(spectrum.weight, second, rank, options.svd_residual, options.sigma)
    return spectrum.factors(rank, options.sigma)


def readers(name: InputName) -> list[str]:
    """Paths inside a layer of the matrices that read an input."""
    return [linear_path(local) for local, read in INPUT_OF.items() if read == name]
