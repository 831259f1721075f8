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
from spq.correct import correction
from spq.decoder import InputName
from spq.feedback import quantize_with_feedback
from spq.manifest import Stored
from spq.quantize import GranularityRule, quantize
from spq.quantize4 import quantize_int4
from spq.recipe import Recipe
from spq.scaling import prune_integers
from spq.svd import decompose, residual_factors

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
    ) -> LinearWeight:
        """The stored form of weight [out, in] float32.

        `second` [in, in] is the second moment of its inputs and `channel_max` [in] their largest magnitudes, where
        the options need them; `factors` are taken instead of a new decomposition. Raises SpqError where a matrix
        cannot be stored.
        """
        if recipe.rank is not None:
            down, up = self.factors(weight, recipe.rank, second) if factors is None else factors
            inner = None if second is None else down.to(second) @ second @ down.to(second).T
            first = self._leaf(f"{module}.down", down, None, recipe.stored, second, channel_max)
            return LowRankWeight(first, self._leaf(f"{module}.up", up, bias, recipe.stored, inner, None))
        main = self._leaf(module, weight, bias, recipe.stored, second, channel_max)
        if not recipe.correction:
            return main
        assert second is not None
        down, up = correction(weight, main.dequantize().to(weight.device), second, recipe.correction)
        stored: Stored = "int8" if self.options.quantize else "dense"
        pair = LowRankWeight(
            self._rounded(f"{module}.correction.down", down, None, stored),
            self._rounded(f"{module}.correction.up", up, None, stored),
        )
        return CorrectedWeight(main, pair)

    def factors(self, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """The pair of a rank by the metric of the options."""
        options = self.options
        if options.svd_metric == "plain":
            return decompose(weight).factors(rank, options.sigma)
        assert second is not None
        if options.svd_residual > 0:
            return residual_factors(weight, second, rank, options.svd_residual)
        return decompose(weight, second).factors(rank, options.sigma)

    def _leaf(
        self, name: str, weight: Tensor, bias: Tensor | None, stored: Stored, second: Tensor | None,
        channel_max: Tensor | None,
    ) -> Leaf:  # fmt: skip
        options = self.options
        if stored == "dense" or not options.feedback or second is None:
            leaf = self._rounded(name, weight, bias, stored)
        else:
            leaf = quantize_with_feedback(
                weight, second, bits=8 if stored == "int8" else 4, group=options.group, symmetric=options.symmetric,
                bias=bias,
            )  # fmt: skip
        if options.integer_pruning > 0 and channel_max is not None and not isinstance(leaf, DenseWeight):
            leaf = prune_integers(leaf, channel_max, options.integer_pruning)
        return to_cpu(leaf)

    def _rounded(self, name: str, weight: Tensor, bias: Tensor | None, stored: Stored) -> Leaf:
        if stored == "dense":
            return DenseWeight(weight.to("cpu", self.float_dtype), bias)
        if stored == "int8":
            return quantize(weight, self.rule.per_channel(name, (weight.shape[0], weight.shape[1])), bias)
        return quantize_int4(weight, self.options.group, self.options.symmetric, bias=bias)


def to_cpu(leaf: Leaf) -> Leaf:
    """The same with its tensors on the CPU."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    if isinstance(leaf, Int8Weight):
        return Int8Weight(leaf.qweight.cpu(), leaf.scale.cpu(), moved(leaf.bias))
    if isinstance(leaf, Int4Weight):
        return Int4Weight(
            leaf.qweight.cpu(), leaf.scale.cpu(), moved(leaf.zero), leaf.group, leaf.in_features, moved(leaf.bias)
        )
    return DenseWeight(leaf.weight.cpu(), moved(leaf.bias))
