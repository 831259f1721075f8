"""W8A8 products for long steps: activations as int8 with one scale per token, times int8 weights, summed in int32.

Opt-in and lossy: the integer tensor cores take both operands without a conversion, at twice the rate of 16-bit ones
(sm_80 and newer), but a token with an outlier keeps few steps for everything else. `ReferenceOps` emulates it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import next_power_of_2
from kernels.gpu.launch import GpuContext
from kernels.gpu.layout import Int8Matrix
from kernels.gpu.primitives import round_to_even
from kernels.ops import Norm

_GROUP_M = 8
_MIN_STEP = tl.constexpr(1e-12)  # of an all-zero row


@dataclass(slots=True)
class Int8Rows:
    """x ~ values * step: int8 [T, width], zeros past the width of x, and float32 [T]."""

    values: Tensor
    step: Tensor


@triton.jit
def quantize_rows_kernel(x, gains, values, step, n, width, x_stride, eps, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """One row of n: step = absmax / 127, values = round(x / step); with NORM of x / rms(x) * gains, never rounded."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + i, mask=i < n, other=0.0).to(tl.float32)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
        v = v * inverse * tl.load(gains + i, mask=i < n, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), 0) / 127.0, _MIN_STEP)
    q = tl.minimum(tl.maximum(round_to_even(v / s), -127.0), 127.0)
    tl.store(step + row, s)
    tl.store(values + row * width + i, q.to(tl.int8), mask=i < width)


@triton.jit(do_not_specialize=["M"])
def int8_rows_linear_kernel(
    x,
    step,
    weight,
    scale,
    bias,
    out,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    MAGIC: tl.constexpr,
    GROUP_M: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per tile of out [M, N]; x [M, K] and weight [N, K] int8 (uint8 q + 128 with MAGIC), K padded."""
    pid = tl.program_id(0)
    per_group = GROUP_M * tl.cdiv(N, BN)
    first_m = (pid // per_group) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BM) - first_m, GROUP_M)
    rm = (first_m + (pid % per_group) % group_m) * BM + tl.arange(0, BM)
    rn = ((pid % per_group) // group_m) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    row_ok = rm < M
    column_ok = rn < N
    x_tile = x + rm.to(tl.int64)[:, None] * K + rk[None, :]
    w_tile = weight + rn.to(tl.int64)[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(0, K, BK):
        a = tl.load(x_tile + k, mask=row_ok[:, None], other=0)
        w = tl.load(w_tile + k, mask=column_ok[None, :], other=0)
        if MAGIC:
            w = (w ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
    y = acc.to(tl.float32) * tl.load(step + rm, mask=row_ok, other=0.0)[:, None]
    y = y * tl.load(scale + rn, mask=column_ok, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + rn, mask=column_ok, other=0.0)[None, :]
    to = out + rm.to(tl.int64)[:, None] * N + rn[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if ADD:
        y += tl.load(to, mask=ok, other=0.0).to(tl.float32)
    tl.store(to, y.to(out.dtype.element_ty), mask=ok)


def quantize_rows(x: Tensor, width: int, norm: Norm | None = None) -> Int8Rows:
    """x [T, n], rows any stride apart, with n <= width -> one scale per row, normed first where `norm` is given."""
    tokens, n = x.shape
    values = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    step = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = next_power_of_2(width)
        quantize_rows_kernel[(tokens,)](
            x,
            step if norm is None else norm.weight,
            values,
            step,
            n,
            width,
            x.stride(0),
            0.0 if norm is None else norm.eps,
            NORM=norm is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return Int8Rows(values, step)


def int8_rows_linear(
    gpu: GpuContext, x: Int8Rows, matrix: Int8Matrix, out_dtype: torch.dtype, add_to: Tensor | None = None
) -> Tensor:
    """x [T, in] -> [T, rows of the matrix] in `out_dtype`, or added to `add_to` [T, rows], which is returned.

    Sums are exact for up to 133,000 inputs (127^2 * K < 2^31).
    """
    tokens = x.values.shape[0]
    out = add_to if add_to is not None else torch.empty(tokens, matrix.rows, dtype=out_dtype, device=x.values.device)
    if out.numel():
        tile = gpu.int8_rows_tile(tokens, matrix.rows, matrix.width)
        int8_rows_linear_kernel[(-(-tokens // tile.block_m) * -(-matrix.rows // tile.block_n),)](
            x.values,
            x.step,
            matrix.weight,
            matrix.scale,
            matrix.scale if matrix.bias is None else matrix.bias,
            out,
            tokens,
            matrix.rows,
            matrix.width,
            HAS_BIAS=matrix.bias is not None,
            ADD=add_to is not None,
            MAGIC=matrix.magic,
            GROUP_M=_GROUP_M,
            BM=tile.block_m,
            BN=tile.block_n,
            BK=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
