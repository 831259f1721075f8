"""RMSNorm, alone or with the residual addition before it (Zhang & Sennrich 2019, eq. 4)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import next_power_of_2


@triton.jit
def rms_norm_kernel(x, residual, weight, out, n, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row of n: out = x / rms(x) * weight; with ADD x + residual takes the place of x and goes to `residual`."""
    first = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    ok = i < n
    v = tl.load(x + first + i, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + first + i, mask=ok, other=0.0).to(tl.float32)
        rounded = v.to(residual.dtype.element_ty)
        tl.store(residual + first + i, rounded, mask=ok)
        v = rounded.to(tl.float32)  # the norm of what the next layer will see
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
    y = v * inverse * tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + first + i, y.to(out.dtype.element_ty), mask=ok)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / rms(x) * weight [n]; rows need not be contiguous (they are copied then)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum overwrites `residual` where that is contiguous."""
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    _launch(x, residual, weight, out, eps, add=True)
    return out, residual


def _launch(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    n = x.shape[-1]
    if tuple(weight.shape) != (n,) or residual.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)} disagree")
    if x.numel():
        block = next_power_of_2(n)
        rms_norm_kernel[(x.numel() // n,)](
            x, residual, weight, out, n, eps, ADD=add, BLOCK=block, num_warps=min(max(block // 512, 1), 8)
        )
