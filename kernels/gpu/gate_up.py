"""MLP input half: silu(x gate^T) * (x up^T), norm, both projections of integers and the activation in one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import TileConfig
from kernels.gpu.int4_product import add_block, load_block, load_block_gains, load_groups, word_index
from kernels.gpu.launch import GpuContext, check_input, masks_k, square_rows
from kernels.gpu.layout import PackedMatrix, packed_constants
from kernels.gpu.primitives import dequantize, dot, silu
from kernels.gpu.product import add_squares, apply_gains, inverse_rms, load_gains, load_rows, sum_squares
from kernels.ops import Norm

_BLOCK = 1024


@triton.jit
def _int8_products(
    x, weight, norm_weight, first_row, rn, M, N, K, x_stride, k_valid, NORM: tl.constexpr, MASK_K: tl.constexpr,
    MAGIC: tl.constexpr, UPCAST: tl.constexpr, SM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(gate, up) float32 [BM, BN] without scales, and the sum of squares [BM]."""
    rm = first_row + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    row_ok = rm < M
    x_tile = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
    gate_tile = weight + rn.to(tl.int64)[None, :] * K + rk[:, None]
    up_tile = gate_tile + tl.cast(N, tl.int64) * K
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((SM, BK), dtype=tl.float32)
    square_rows = first_row + tl.arange(0, SM)
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
    return gate, up, sum_squares(squares, BM)


@triton.jit
def _int4_products(
    x, weight, scale, zero, norm_weight, first_row, rn, M, N, K, x_stride, k_valid, NORM: tl.constexpr,
    MASK_K: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UPCAST: tl.constexpr, SM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(gate, up) float32 [BM, BN], scaled, and the sum of squares [BM]; as `int4_product` for two matrices."""
    Q: tl.constexpr = BK // 4
    GROUPS: tl.constexpr = BK // GROUP
    rm = first_row + tl.arange(0, BM)
    rk = tl.arange(0, Q)
    row_ok = rm < M
    column_ok = rn < N
    x_tile = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
    gate_tile = weight + rn.to(tl.int64)[None, :] * word_index(K) + rk[:, None]
    up_tile = gate_tile + tl.cast(N, tl.int64) * word_index(K)
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((SM, Q), dtype=tl.float32)
    square_rows = first_row + tl.arange(0, SM)
    square_ok = square_rows < M
    square_tile = x + square_rows.to(tl.int64)[:, None] * x_stride + rk[None, :]
    s0, s1, s2, s3 = load_groups(scale + rn, 0, 2 * N, column_ok, GROUPS)
    t0, t1, t2, t3 = load_groups(scale + N + rn, 0, 2 * N, column_ok, GROUPS)
    y0, y1, y2, y3 = s0, s1, s2, s3
    z0, z1, z2, z3 = s0, s1, s2, s3
    if ZERO:
        y0, y1, y2, y3 = load_groups(zero + rn, 0, 2 * N, column_ok, GROUPS)
        z0, z1, z2, z3 = load_groups(zero + N + rn, 0, 2 * N, column_ok, GROUPS)
    g0, g1, g2, g3 = rk, rk, rk, rk
    if NORM:
        g0, g1, g2, g3 = load_block_gains(norm_weight, rk, 0, K, k_valid, MASK_K)
    for k in range(0, K, BK):
        gate_words = tl.load(gate_tile + word_index(k))
        up_words = tl.load(up_tile + word_index(k))
        a0, a1, a2, a3, squares = load_block(
            x_tile, square_tile, g0, g1, g2, g3, squares, row_ok, square_ok, k, rk, k_valid, NORM, MASK_K, UPCAST, BM
        )
        gate = add_block(gate, a0, a1, a2, a3, gate_words, s0, s1, s2, s3, y0, y1, y2, y3, GROUPS, ZERO, UPCAST)
        up = add_block(up, a0, a1, a2, a3, up_words, t0, t1, t2, t3, z0, z1, z2, z3, GROUPS, ZERO, UPCAST)
        ok = column_ok & (k + BK < K)
        group = (k + BK) // GROUP
        s0, s1, s2, s3 = load_groups(scale + rn, group, 2 * N, ok, GROUPS)
        t0, t1, t2, t3 = load_groups(scale + N + rn, group, 2 * N, ok, GROUPS)
        if ZERO:
            y0, y1, y2, y3 = load_groups(zero + rn, group, 2 * N, ok, GROUPS)
            z0, z1, z2, z3 = load_groups(zero + N + rn, group, 2 * N, ok, GROUPS)
        if NORM:
            g0, g1, g2, g3 = load_block_gains(norm_weight, rk, k + BK, K, k_valid, MASK_K)
    return gate, up, sum_squares(squares, BM)


@triton.jit(do_not_specialize=["M"])
def gate_up_silu_kernel(
    x,
    weight,
    scale,
    zero,
    bias,
    norm_weight,
    out,
    M,
    N,
    K,
    x_stride,
    k_valid,
    eps,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
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
    """out [M, N]; weight [2, N, K], bias [2, N], gate first; N and K are multiples of 128.

    scale is [2, N] of int8; of int4, with GROUP, scale and zero are [K / GROUP, 2, N].
    """
    first_row = tl.program_id(0) * BM  # row tiles are neighbours: they share the weights in the L2 cache
    rm = first_row + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok = rm < M
    rows = rm.to(tl.int64)
    if GROUP:
        gate, up, squares = _int4_products(
            x, weight, scale, zero, norm_weight, first_row, rn, M, N, K, x_stride, k_valid, NORM, MASK_K, GROUP, ZERO,
            UPCAST, SM, BM, BN, BK,
        )  # fmt: skip
    else:
        gate, up, squares = _int8_products(
            x,
            weight,
            norm_weight,
            first_row,
            rn,
            M,
            N,
            K,
            x_stride,
            k_valid,
            NORM,
            MASK_K,
            MAGIC,
            UPCAST,
            SM,
            BM,
            BN,
            BK,
        )
        gate = gate * tl.load(scale + rn)[None, :]
        up = up * tl.load(scale + N + rn)[None, :]
    if NORM:
        inverse = inverse_rms(squares, k_valid, eps)[:, None]
        gate = gate * inverse
        up = up * inverse
    if HAS_BIAS:
        gate += tl.load(bias + rn)[None, :]
        up += tl.load(bias + N + rn)[None, :]
    y = silu(gate) * up
    tl.store(out + rows[:, None] * N + rn[None, :], y.to(out.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def silu_mul_kernel(gate, up, out, n, gate_stride, up_stride, BLOCK: tl.constexpr):
    """out [T, n] = silu(gate) * up, elementwise."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + row * gate_stride + i, mask=i < n, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + i, (silu(a) * b).to(out.dtype.element_ty), mask=i < n)


def gate_up_silu(
    gpu: GpuContext,
    x: Tensor,
    matrix: PackedMatrix,
    width: int,
    *,
    norm: Norm | None = None,
    tile: TileConfig | None = None,
) -> Tensor:
    """x [T, in] -> [T, width]: a view of rows padded to a multiple of 128 with zeros, which the product of the
    following projection reads without a mask or a copy. With `norm` x is normed first, as in `packed_linear`."""
    check_input(x, matrix)
    num_rows, n, k = x.shape[0], matrix.rows // 2, matrix.width
    out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if num_rows:
        group, zero, magic = packed_constants(matrix)
        if tile is None:
            tile = gpu.tile("gate_up", num_rows, n, k, group)
        gate_up_silu_kernel[(-(-num_rows // tile.block_m), n // tile.block_n)](
            x,
            matrix.weight,
            matrix.scale,
            matrix.scale if zero is None else zero,
            matrix.scale if matrix.bias is None else matrix.bias,
            matrix.scale if norm is None else norm.weight,
            out,
            num_rows,
            n,
            k,
            x.stride(0),
            x.shape[1],
            0.0 if norm is None else norm.eps,
            GROUP=group,
            ZERO=zero is not None,
            HAS_BIAS=matrix.bias is not None,
            NORM=norm is not None,
            MASK_K=masks_k(x, matrix),
            MAGIC=magic,
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
    """silu(gate) * up [T, n], rows of either any stride apart: the route of projections that share no launch."""
    tokens, n = gate.shape
    out = torch.empty(tokens, n, dtype=gate.dtype, device=gate.device)
    if out.numel():
        strides = gate.stride(0), up.stride(0)
        silu_mul_kernel[(tokens, -(-n // _BLOCK))](gate, up, out, n, *strides, BLOCK=_BLOCK, num_warps=4)
    return out
