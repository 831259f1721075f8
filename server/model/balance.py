"""Evens out the channels of keys, so that an int8 cache with one scale per token and head fits all of them.

A few channels of the keys of large models are many times larger than the rest, and one scale then leaves the rest few
steps. Dividing a rotary pair of key channels by a factor and multiplying the queries by it changes no score. It is
SmoothAttention (QServe, Lin et al. 2024) with strength 1 and the lengths of weight rows in place of activations.
Factors are powers of two, which round nothing: with a float cache the logits stay what they are, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import Norm
from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, LinearWeight, LowRankWeight

MAX_EXPONENT = 8  # a factor is at most 2^8: enough for any outlier seen, and float16 stays in range


def balance_projections(q: LinearWeight, k: LinearWeight, head_dim: int) -> tuple[LinearWeight, LinearWeight]:
    """Projections of queries [HQ * D, in] and keys [HKV * D, in] with even key rows; the arguments stay as they are."""
    exponents = _exponents(_row_norms(k).view(-1, head_dim))  # [HKV, D]
    group = q.shape[0] // k.shape[0]
    up = exponents.repeat_interleave(group, 0).flatten()
    return _scale_rows(q, up), _scale_rows(k, -exponents.flatten())


def balance_norms(q: Norm, k: Norm) -> tuple[Norm, Norm]:
    """The same where query and key heads are normed (Qwen3): the weights [D] of the norms take the factors."""
    exponents = _exponents(k.weight.float().abs()[None])[0]
    return Norm(_shift(q.weight, exponents), q.eps), Norm(_shift(k.weight, -exponents), k.eps)


def _exponents(sizes: Tensor) -> Tensor:
    """int32 [H, D]: log2 of how much larger a channel's rotary pair is than the (geometric) mean of its head."""
    half = sizes.shape[1] // 2
    pairs = (sizes[:, :half].square() + sizes[:, half:].square()).sqrt()
    logs = pairs.clamp_min(1e-6 * pairs.amax(-1, keepdim=True)).clamp_min(1e-30).log2()
    exponents = (logs - logs.mean(-1, keepdim=True)).round().clamp(-MAX_EXPONENT, MAX_EXPONENT).to(torch.int32)
    return torch.cat((exponents, exponents), 1)


def _row_norms(weight: LinearWeight) -> Tensor:
    """float32 [out]: the length of each row; of a low-rank pair, as if the rows of its first factor were orthogonal."""
    rows = (
        weight.up.dequantize() * _row_norms(weight.down) if isinstance(weight, LowRankWeight) else weight.dequantize()
    )
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _scale_rows(weight: LinearWeight, exponents: Tensor) -> LinearWeight:
    """Row i times 2^exponents[i], the bias too."""
    bias = None if weight.bias is None else _shift(weight.bias, exponents)
    if isinstance(weight, CorrectedWeight):
        main, correction = _scale_rows(weight.main, exponents), _scale_rows(weight.correction, exponents)
        assert not isinstance(main, LowRankWeight | CorrectedWeight) and isinstance(correction, LowRankWeight)
        return CorrectedWeight(main, correction)
    if isinstance(weight, LowRankWeight):
        up = _scale_rows(weight.up, exponents)
        assert not isinstance(up, LowRankWeight | CorrectedWeight)
        return LowRankWeight(weight.down, up)
    if isinstance(weight, Int4Weight):
        scale = _shift(weight.scale.float(), exponents[:, None])  # a float16 scale could leave its range
        return Int4Weight(weight.qweight, scale, weight.zero, weight.group, weight.in_features, bias)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.qweight, _shift(weight.scale, exponents), bias)
    return DenseWeight(_shift(weight.weight, exponents[:, None]), bias)


def _shift(x: Tensor, exponents: Tensor) -> Tensor:
    return (x.float() * torch.exp2(exponents.to(x.device).float())).to(x.dtype)
