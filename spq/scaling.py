"""Double compression before the coder: input channels scaled so that integers crowd near zero, small ones set to zero.

After "Memory-Efficient LLMs with Double Compression" (Wang et al. 2025, arXiv 2502.15443). Channels with large
activations are scaled up before quantization, s_i = max|X_i|^alpha, which stretches the grid of each row and leaves the
other weights few steps; 1 / s goes into the norm in front: the float model stays what it was up to rounding. Integers
are pruned without a mask: zeros are cheap to code. (The direction of s is our reading of summaries of the paper.)

Not the coder (`entropy`), not how far to go (`squeeze`) and not who calls this, in what order (`pipeline`). Only
matrices behind a norm are scaled: q, k, v share the attention norm, gate and up the one of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kernels.weights import Int4Weight, Int8Weight, pack_int4
from spq.entropy import entropy_bits

IntegersT = TypeVar("IntegersT", bound=Int8Weight | Int4Weight)


def channel_scales(channel_max: Tensor, alpha: float) -> Tensor:
    """float32 [n]: s_i = max|X_i|^alpha over a geometric mean of 1; channels that never saw an input keep 1.

    channel_max [n] is the largest |X_i| of each input channel. Raises ValueError where it is negative or not finite.
    """
    top = channel_max.double()
    if not bool(torch.isfinite(top).all()) or bool((top < 0).any()):
        raise ValueError("channel maxima must be finite and not negative")
    alive = top > 0
    logs = torch.zeros_like(top)
    if bool(alive.any()):
        logs[alive] = top[alive].log()
        logs[alive] -= logs[alive].mean()
    return (alpha * logs).exp().float()


def fold(norm: Tensor, weights: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(norm / s, [W diag(s)]): norm [n], each W [out, n], all float; the map norm -> W stays the same.

    Everything comes back in its own dtype. Raises ValueError where a result leaves the range of that dtype.
    """
    folded = [(norm.float() / scales).to(norm.dtype)]
    folded += [(weight.float() * scales).to(weight.dtype) for weight in weights]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in folded):
        raise ValueError(f"scales from {scales.min():.3g} to {scales.max():.3g} leave the range; lower alpha")
    return folded[0], folded[1:]


def prune_integers(weight: IntegersT, channel_max: Tensor, fraction: float) -> IntegersT:
    """Set the `fraction` of the integers with the lowest max|X_i| * |Q| to zero; those that are zero count as well.

    channel_max [in]. Of equal scores the first in memory go, so the result is the same everywhere. Raises ValueError
    for a fraction outside 0..1 and for int4 with zero points, where 0 is no common symbol.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} of the integers: give 0 to 1")
    if isinstance(weight, Int4Weight) and weight.zero is not None:
        raise ValueError("int4 with zero points cannot be pruned: make it symmetric")
    q = weight.qweight if isinstance(weight, Int8Weight) else weight.integers()
    kept = torch.where(_lowest(q.abs() * channel_max.float(), round(fraction * q.numel())), 0, q)
    if isinstance(weight, Int8Weight):
        return replace(weight, qweight=kept)
    return replace(weight, qweight=pack_int4((kept + 8).to(torch.uint8)))


def _lowest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` lowest scores [out, in], the first of equal ones."""
    flat = score.flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    mask = flat < limit
    missing = count - int(mask.sum())
    mask[(flat == limit).nonzero().flatten()[:missing]] = True
    return mask.view_as(score)


def coded_bytes(weight: Int8Weight | Int4Weight) -> int:
    """Predicted bytes of the integers once coded: the entropy, or what they have where they would stay raw."""
    return min(weight.qweight.nbytes, round(weight.qweight.numel() * entropy_bits(weight.qweight) / 8))
