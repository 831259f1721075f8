"""The inner loop of the int8 products: a tile of activations times a tile of weights, along a slice of K.

Not a kernel: it is inlined into those that differ in what they do with the sum. The root mean square norm of the
input may be folded in: rms commutes with the product, so rows are multiplied by the norm's weights as they are
loaded, their squares are summed on the way, and whoever called divides by rms at the end.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.primitives import dequantize, dot


@triton.jit
def load_rows(x_tile, row_ok, k, rk, k_valid, MASK_K: tl.constexpr):
    """[BM, BK] activations from column k on, zeros past the last row and, with MASK_K, past column `k_valid`."""
    if MASK_K:
        return tl.load(x_tile + k, mask=row_ok[:, None] & (rk[None, :] + k < k_valid), other=0.0)
    else:
        return tl.load(x_tile + k, mask=row_ok[:, None], other=0.0)


@triton.jit
def load_gains(norm_weight, rk, k, k_end, k_valid, MASK_K: tl.constexpr):
    """[BK] norm weights from column k on; zeros past the end."""
    limit = tl.minimum(k_end, k_valid) if MASK_K else k_end
    return tl.load(norm_weight + k + rk, mask=k + rk < limit, other=0.0)


@triton.jit
def apply_gains(a, gains, UPCAST: tl.constexpr):
    """Rows a [BM, BK] times the norm weights, rounded once. In 16 bits two elements are one instruction, and every
    warp does this for the whole tile (UPCAST: as in `primitives.dot`)."""
    if UPCAST:
        return (a.to(tl.float32) * gains.to(tl.float32)[None, :]).to(a.dtype)
    else:
        return a * gains.to(a.dtype)[None, :]


@triton.jit
def add_squares(squares, a, square_tile, square_ok, k, rk, k_valid, MASK_K: tl.constexpr, BM: tl.constexpr):
    """squares [SM, BK] += the squares of columns k to k + BK of the rows that exist.

    With SM < BM a tile of 16 rows holds at most SM: those are loaded once more from `square_tile`, which costs less
    than squaring the rest.
    """
    if squares.shape[0] < BM:
        a = load_rows(square_tile, square_ok, k, rk, k_valid, MASK_K)
    wide = a.to(tl.float32)
    return squares + wide * wide


@triton.jit
def sum_squares(squares, BM: tl.constexpr):
    """[SM, BK] -> float32 [BM]: sums of rows, zero for rows past SM."""
    SM: tl.constexpr = squares.shape[0]
    sums = tl.sum(squares, 1)
    if SM < BM:
        same = tl.arange(0, BM)[:, None] == tl.arange(0, SM)[None, :]
        sums = tl.sum(tl.where(same, sums[None, :], 0.0), 1)
    return sums


@triton.jit
def int8_product(
    x,
    w_tile,
    norm_weight,
    rm,
    column_ok,
    M,
    x_stride,
    k_begin,
    k_end,
    k_valid,
    NORM: tl.constexpr,
    MASK_K: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    SM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Columns k_begin to k_end (a multiple of BK apart) of the product: (float32 [BM, BN], sum of squares [BM]).

    Rows rm [BM] of x lie x_stride apart, w_tile [BK, BN] points at column 0. With NORM x is multiplied by the norm
    weights and rounded once to its dtype, as the norm itself would round; without, the sum of squares is zero.
    SM: see `add_squares`.
    """
    rk = tl.arange(0, BK)
    row_ok = rm < M
    x_tile = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((SM, BK), dtype=tl.float32)
    square_rows = tl.min(rm, 0) + tl.arange(0, SM)
    square_tile = x + square_rows.to(tl.int64)[:, None] * x_stride + rk[None, :]
    if NORM:
        gains = load_gains(norm_weight, rk, k_begin, k_end, k_valid, MASK_K)
    for k in range(k_begin, k_end, BK):
        a = load_rows(x_tile, row_ok, k, rk, k_valid, MASK_K)
        if NORM:
            # The gains of the next step are on their way while this one computes: a load of so few bytes a thread is
            # not made asynchronous by the compiler.
            next_gains = load_gains(norm_weight, rk, k + BK, k_end, k_valid, MASK_K)
            squares = add_squares(squares, a, square_tile, square_rows < M, k, rk, k_valid, MASK_K, BM)
            a = apply_gains(a, gains, UPCAST)
            gains = next_gains
        w = tl.load(w_tile + k, mask=column_ok[None, :], other=0)
        acc = dot(a, dequantize(w, a.dtype, MAGIC, UPCAST), acc, UPCAST)
    return acc, sum_squares(squares, BM)


@triton.jit
def inverse_rms(squares, n, eps):
    """1 / rms of rows of n elements from the sum of their squares (Zhang & Sennrich 2019, eq. 4)."""
    return 1.0 / tl.sqrt(squares / n + eps)


@triton.jit
def store_partial(partial, acc, squares, row_ok, BM: tl.constexpr, BN: tl.constexpr):
    """One program's share of a product at `partial`: [BM, BN] then [BM], rows that exist, past the L1 cache."""
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    tl.store(partial + rm[:, None] * BN + rn[None, :], acc, mask=row_ok[:, None], cache_modifier=".cg")
    tl.store(partial + BM * BN + rm, squares, mask=row_ok, cache_modifier=".cg")


@triton.jit
def sum_partials(partial, count, row_ok, BM: tl.constexpr, BN: tl.constexpr):
    """The sum of `count` shares that lie one after the other, in their order: the same bits in every run."""
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((BM,), dtype=tl.float32)
    for i in range(count):
        share = partial + i * (BM * BN + BM)
        at = share + rm[:, None] * BN + rn[None, :]
        acc += tl.load(at, mask=row_ok[:, None], other=0.0, cache_modifier=".cg")
        squares += tl.load(share + BM * BN + rm, mask=row_ok, other=0.0, cache_modifier=".cg")
    return acc, squares
