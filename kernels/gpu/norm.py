"""RMSNorm on its own (Zhang & Sennrich 2019, eq. 4): for prompts, float projections and the last norm of a model."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import next_power_of_2


@triton.jit
def rms_norm_kernel(x, weight, out, n, eps, BLOCK: tl.constexpr):
    """One row of n: out = x / rms(x) * weight, all in float32, rounded once."""
    first = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    ok = i < n
    v = tl.load(x + first + i, mask=ok, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
    y = v * inverse * tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + first + i, y.to(out.dtype.element_ty), mask=ok)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / rms(x) * weight [n]; rows need not be contiguous (they are copied then)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.shape[-1]
    if tuple(weight.shape) != (n,):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} disagree")
    if x.numel():
        block = next_power_of_2(n)
        rms_norm_kernel[(x.numel() // n,)](x, weight, out, n, eps, BLOCK=block, num_warps=min(max(block // 512, 1), 8))
    return out
