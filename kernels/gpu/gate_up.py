"""MLP input half: silu(x gate^T) * (x up^T), both int8 projections and the activation in one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import gate_up_config
from kernels.gpu.layout import Int8Matrices
from kernels.gpu.primitives import dequantize, dot, silu

_BLOCK = 1024


@triton.jit(do_not_specialize=["M"])
def gate_up_silu_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    k_valid,
    HAS_BIAS: tl.constexpr,
    MASK_K: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [M, N]; weight [2, N, K], scale and bias [2, N], gate first; N and K are multiples of 128."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)  # row tiles are neighbours: they share the weights in the L2 cache
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    row_ok = rm < M
    rows = rm.to(tl.int64)
    x_tile = x + rows[:, None] * x_stride + rk[None, :]
    gate_tile = weight + rn.to(tl.int64)[None, :] * K + rk[:, None]
    up_tile = gate_tile + tl.cast(N, tl.int64) * K
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        if MASK_K:
            a = tl.load(x_tile, mask=row_ok[:, None] & (rk[None, :] + k < k_valid), other=0.0)
        else:
            a = tl.load(x_tile, mask=row_ok[:, None], other=0.0)
        gate_w = dequantize(tl.load(gate_tile), a.dtype, MAGIC, UPCAST)
        up_w = dequantize(tl.load(up_tile), a.dtype, MAGIC, UPCAST)
        gate = dot(a, gate_w, gate, UPCAST)
        up = dot(a, up_w, up, UPCAST)
        x_tile += BK
        gate_tile += BK
        up_tile += BK
    gate = gate * tl.load(scale + rn)[None, :]
    up = up * tl.load(scale + N + rn)[None, :]
    if HAS_BIAS:
        gate += tl.load(bias + rn)[None, :]
        up += tl.load(bias + N + rn)[None, :]
    y = silu(gate) * up
    tl.store(out + rows[:, None] * N + rn[None, :], y.to(out.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["numel"])
def silu_mul_kernel(gate, up, out, numel, BLOCK: tl.constexpr):
    """out = silu(gate) * up, elementwise over `numel` elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    a = tl.load(gate + i, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(up + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + i, (silu(a) * b).to(out.dtype.element_ty), mask=ok)


def gate_up_silu(x: Tensor, matrices: Int8Matrices, width: int) -> Tensor:
    """x [T, in] -> [T, width]: a view of rows padded to a multiple of 128 with zeros, which the int8 GEMM of the
    following projection reads without a mask or a copy."""
    if x.shape[1] != matrices.in_features[0] or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; [T, {matrices.in_features[0]}] with dense rows is needed")
    num_rows, n, k = x.shape[0], matrices.rows[0], matrices.widths[0]
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if num_rows:
        interpreted = x.device.type == "cpu"
        tile = gate_up_config(num_rows, x.dtype, interpreted)
        gate_up_silu_kernel[(-(-num_rows // tile.block_m), n // tile.block_n)](
            x,
            matrices.weight,
            matrices.scale,
            matrices.scale if matrices.bias is None else matrices.bias,
            out,
            num_rows,
            n,
            k,
            x.stride(0),
            x.shape[1],
            HAS_BIAS=matrices.bias is not None,
            MASK_K=x.shape[1] != k and x.stride(0) != k,
            MAGIC=matrices.magic,
            UPCAST=interpreted,
            BM=tile.block_m,
            BN=tile.block_n,
            BK=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out[:, :width]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two contiguous tensors of one shape: the route of float or low-rank projections."""
    out = torch.empty_like(gate)
    if gate.numel():
        silu_mul_kernel[(-(-gate.numel() // _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK, num_warps=4)
    return out
