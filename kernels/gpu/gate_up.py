"""MLP input half: silu(x gate^T) * (x up^T), norm, both int8 projections and the activation in one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import TileConfig
from kernels.gpu.launch import GpuContext, check_input, masks_k, square_rows
from kernels.gpu.layout import Int8Matrix
from kernels.gpu.primitives import dequantize, dot, silu
from kernels.gpu.product import add_squares, apply_gains, inverse_rms, load_gains, load_rows, sum_squares
from kernels.ops import Norm

_BLOCK = 1024


@triton.jit(do_not_specialize=["M"])
def gate_up_silu_kernel(
    x,
    weight,
    scale,
    bias,
    norm_weight,
    out,
    M,
    N,
    K,
    x_stride,
    k_valid,
    eps,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    MASK_K: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    SM: tl.constexpr,
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
    squares = tl.zeros((SM, BK), dtype=tl.float32)
    square_rows = tl.program_id(0) * BM + tl.arange(0, SM)
    square_tile = x + square_rows.to(tl.int64)[:, None] * x_stride + rk[None, :]
    if NORM:
        gains = load_gains(norm_weight, rk, 0, K, k_valid, MASK_K)
    for k in range(0, K, BK):
        a = load_rows(x_tile, row_ok, k, rk, k_valid, MASK_K)
        if NORM:
            next_gains = load_gains(norm_weight, rk, k + BK, K, k_valid, MASK_K)  # see product.int8_product
            squares = add_squares(squares, a, square_tile, square_rows < M, k, rk, k_valid, MASK_K, BM)
            a = apply_gains(a, gains, UPCAST)
            gains = next_gains
        gate = dot(a, dequantize(tl.load(gate_tile + k), a.dtype, MAGIC, UPCAST), gate, UPCAST)
        up = dot(a, dequantize(tl.load(up_tile + k), a.dtype, MAGIC, UPCAST), up, UPCAST)
    gate = gate * tl.load(scale + rn)[None, :]
    up = up * tl.load(scale + N + rn)[None, :]
    if NORM:
        inverse = inverse_rms(sum_squares(squares, BM), k_valid, eps)[:, None]
        gate = gate * inverse
        up = up * inverse
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


def gate_up_silu(
    gpu: GpuContext,
    x: Tensor,
    matrix: Int8Matrix,
    width: int,
    *,
    norm: Norm | None = None,
    tile: TileConfig | None = None,
) -> Tensor:
    """x [T, in] -> [T, width]: a view of rows padded to a multiple of 128 with zeros, which the int8 GEMM of the
    following projection reads without a mask or a copy. With `norm` x is normed first, as in `int8_linear`."""
    check_input(x, matrix)
    num_rows, n, k = x.shape[0], matrix.rows // 2, matrix.width
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if num_rows:
        if tile is None:
            tile = gpu.tile("gate_up", num_rows, n, k)
        gate_up_silu_kernel[(-(-num_rows // tile.block_m), n // tile.block_n)](
            x,
            matrix.weight,
            matrix.scale,
            matrix.scale if matrix.bias is None else matrix.bias,
            matrix.scale if norm is None else norm.weight,
            out,
            num_rows,
            n,
            k,
            x.stride(0),
            x.shape[1],
            0.0 if norm is None else norm.eps,
            HAS_BIAS=matrix.bias is not None,
            NORM=norm is not None,
            MASK_K=masks_k(x, matrix),
            MAGIC=matrix.magic,
            UPCAST=gpu.interpreted,
            SM=square_rows(tile, num_rows),
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
