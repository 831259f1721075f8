"""Symmetric int8 of one matrix, and which matrices get a scale per row.

Not the storage (`writer`). No activations are involved: weights only, round half to even, values in [-127, 127].
A single scale is stored as a constant vector, so that every matrix has one layout (4 bytes per row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights import Int8Weight
from spq.architecture import ATTENTION, MLP
from spq.config import Granularity

LEVELS = 127
MIN_ROW_SCALE = 1e-6  # floors of the released code, kept so that zero rows divide by something
MIN_TENSOR_MAX = 5e-7
CHUNK_ELEMENTS = 1 << 24  # rows are quantized in pieces of 64 MiB of float32


def row_scales(weight: Tensor, per_channel: bool) -> Tensor:
    """Scales float32 [out] of weight [out, in]: max|row| / 127, or the matrix's maximum in every entry."""
    if per_channel:
        return (weight.float().abs().amax(dim=1) / LEVELS).clamp_min(MIN_ROW_SCALE)
    top = weight.float().abs().max().clamp_min(MIN_TENSOR_MAX)
    return (top / LEVELS).expand(weight.shape[0]).clone()


def quantize_with(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in] of weight [out, in] for given scales [out]."""
    return (weight.float() / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def quantize(weight: Tensor, per_channel: bool, bias: Tensor | None = None) -> Int8Weight:
    """Symmetric int8 of weight [out, in] (any float dtype); the bias is passed through."""
    return quantize_streamed(lambda start, stop: weight[start:stop], weight.shape, per_channel, bias)


def quantize_streamed(
    read_rows: Callable[[int, int], Tensor], shape: Sequence[int], per_channel: bool, bias: Tensor | None = None
) -> Int8Weight:
    """`quantize` of a matrix [out, in] that is handed out by row ranges, so that no float32 copy of it is made.

    A single scale needs a first round over all rows for the maximum.
    """
    rows, columns = shape
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    shared: Tensor | None = None
    if not per_channel:
        shared = torch.stack([row_scales(read_rows(*span), per_channel=False)[0] for span in ranges]).max()
    scale = torch.empty(rows, dtype=torch.float32)
    qweight = torch.empty((rows, columns), dtype=torch.int8)
    for start, stop in ranges:
        piece = read_rows(start, stop)
        scales = row_scales(piece, True) if shared is None else shared.expand(stop - start)
        scale[start:stop] = scales.cpu()
        qweight[start:stop] = quantize_with(piece, scales).cpu()
    return Int8Weight(qweight, scale, bias)


@dataclass(frozen=True, slots=True)
class GranularityRule:
    """Which matrices get one scale per row; the names are those of the released code.

    - channel, tensor: all, none
    - mix_name: MLP per row; q, k, v, o, their factors and the head one scale; others per row if large
    - mix_percentile: per row from the median of all output sizes on
    - mix_meanstd: per row from their mean + half a standard deviation on
    """

    granularity: Granularity
    threshold: float  # output size from which a row scale is used; only by the last two

    @classmethod
    def over(cls, granularity: Granularity, out_features: Sequence[int]) -> GranularityRule:
        """The rule for a model whose linear layers (each factor counts as one) have these output sizes."""
        sizes = torch.tensor(list(out_features), dtype=torch.float64)
        threshold = 0.0
        if granularity == "mix_percentile":
            threshold = float(torch.quantile(sizes, 0.5))
        elif granularity == "mix_meanstd":
            threshold = float(sizes.mean() + 0.5 * sizes.std(correction=0))
        return cls(granularity, threshold)

    def per_channel(self, module: str, shape: tuple[int, int]) -> bool:
        """Whether the matrix or factor `module` (full name) of shape (out, in) gets one scale per row."""
        if self.granularity in ("channel", "tensor"):
            return self.granularity == "channel"
        rows, columns = shape
        if self.granularity != "mix_name":
            return rows >= self.threshold
        names = module.split(".")
        if any(name in MLP for name in names):
            return True
        if any(name in ATTENTION for name in names) or names[-1] == "lm_head":
            return False
        return rows * columns > 1_000_000 or rows >= 1024
