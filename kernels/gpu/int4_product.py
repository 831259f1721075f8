"""The inner loop of the int4 products: a tile of activations times a tile of words of four integers each.

Not a kernel, as `product`. What differs from int8 is the scale: one per row and group of inputs, so it cannot wait
for the end. It is applied to a float32 sum per group, not to the weights: integers are exact in 16 bits, a weight
times its scale is not (a float16 scale may even make it subnormal), and for few rows the sum of a group has 16
elements a column where its weights are 128. Sums are added group after group, in their order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.primitives import dot
from kernels.gpu.product import add_squares, apply_gains, load_gains, load_rows, sum_squares


@triton.jit
def word_index(k):
    """Words before input k, where a block begins: the hint keeps loads 16 bytes wide."""
    return tl.multiple_of(k // 4, 16)


@triton.jit
def unpack(words, zero, dtype: tl.constexpr, PART: tl.constexpr, UPCAST: tl.constexpr):
    """Quarter PART of a tile of words as `dtype`, less `zero` (8.0, or values [1, BN] in `dtype`), exactly.

    By bits alone, as in `primitives.dequantize`: with the exponent of 1024 (float16) or 128 (bfloat16) a nibble at the
    bottom of the mantissa adds its value; float16 has room for one 4 bits higher, as 16 times the value. UPCAST: as in
    `primitives.dot`.
    """
    if PART >= 2:
        words = words >> 8
    if dtype == tl.bfloat16:
        if PART % 2 == 1:
            words = words >> 4
        w = ((words & 15) | 0x4300).to(tl.bfloat16, bitcast=True)
    elif PART % 2 == 1:
        w = ((words & 0xF0) | 0x6400).to(tl.float16, bitcast=True) * 0.0625
    else:
        w = ((words & 15) | 0x6400).to(tl.float16, bitcast=True)
    w = w.to(tl.float32 if UPCAST else dtype)
    return w - ((128.0 if dtype == tl.bfloat16 else 64.0 if PART % 2 == 1 else 1024.0) + zero)


@triton.jit
def load_groups(values, first, stride, ok, GROUPS: tl.constexpr):
    """Rows `first` and on of values [groups, ..], one vector for each quarter of a block of 1, 2 or 4 groups."""
    at = values + first * stride
    a = tl.load(at, mask=ok, other=0)
    b = a
    c = a
    d = a
    if GROUPS == 2:
        c = tl.load(at + stride, mask=ok, other=0)
        d = c
    if GROUPS == 4:
        b = tl.load(at + stride, mask=ok, other=0)
        c = tl.load(at + 2 * stride, mask=ok, other=0)
        d = tl.load(at + 3 * stride, mask=ok, other=0)
    return a, b, c, d


@triton.jit
def zero_value(zero, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Zero points [BN] (bytes) as `unpack` takes them."""
    if UPCAST:
        return zero.to(tl.float32)[None, :]
    else:
        return zero.to(dtype)[None, :]


@triton.jit
def add_quarter(acc, part, a, words, scale, zero, PART: tl.constexpr, CLOSES: tl.constexpr, ZERO: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """(acc, sum of the group so far) after one quarter of a block; where it CLOSES a group that goes to acc, scaled."""
    if ZERO:
        w = unpack(words, zero_value(zero, a.dtype, UPCAST), a.dtype, PART, UPCAST)
    else:
        w = unpack(words, 8.0, a.dtype, PART, UPCAST)
    part = dot(a, w, part, UPCAST)
    if CLOSES:
        acc += part * scale.to(tl.float32)[None, :]
        part = tl.zeros_like(part)
    return acc, part


@triton.jit
def add_block(
    acc, a0, a1, a2, a3, words, s0, s1, s2, s3, z0, z1, z2, z3, GROUPS: tl.constexpr, ZERO: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + a block: quarters a0 to a3 [BM, BK / 4] of the activations times words [BK / 4, BN]."""
    part = tl.zeros_like(acc)
    acc, part = add_quarter(acc, part, a0, words, s0, z0, 0, GROUPS == 4, ZERO, UPCAST)
    acc, part = add_quarter(acc, part, a1, words, s1, z1, 1, GROUPS >= 2, ZERO, UPCAST)
    acc, part = add_quarter(acc, part, a2, words, s2, z2, 2, GROUPS == 4, ZERO, UPCAST)
    acc, part = add_quarter(acc, part, a3, words, s3, z3, 3, True, ZERO, UPCAST)
    return acc


@triton.jit
def load_block_gains(norm_weight, rk, k, k_end, k_valid, MASK_K: tl.constexpr):
    """Norm weights of the four quarters of the block that begins at column k."""
    Q: tl.constexpr = rk.shape[0]
    a = load_gains(norm_weight, rk, k, k_end, k_valid, MASK_K)
    b = load_gains(norm_weight, rk, k + Q, k_end, k_valid, MASK_K)
    c = load_gains(norm_weight, rk, k + 2 * Q, k_end, k_valid, MASK_K)
    d = load_gains(norm_weight, rk, k + 3 * Q, k_end, k_valid, MASK_K)
    return a, b, c, d


@triton.jit
def load_quarter(
    x_tile, square_tile, gains, squares, row_ok, square_ok, k, rk, k_valid, NORM: tl.constexpr, MASK_K: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """[BM, Q] activations from column k on, normed as in `product.int8_product`, and the squares so far."""
    a = load_rows(x_tile, row_ok, k, rk, k_valid, MASK_K)
    if NORM:
        squares = add_squares(squares, a, square_tile, square_ok, k, rk, k_valid, MASK_K, BM)
        a = apply_gains(a, gains, UPCAST)
    return a, squares


@triton.jit
def load_block(
    x_tile, square_tile, g0, g1, g2, g3, squares, row_ok, square_ok, k, rk, k_valid, NORM: tl.constexpr,
    MASK_K: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The four quarters of the block that begins at column k."""
    Q: tl.constexpr = rk.shape[0]
    a, squares = load_quarter(
        x_tile, square_tile, g0, squares, row_ok, square_ok, k, rk, k_valid, NORM, MASK_K, UPCAST, BM
    )
    b, squares = load_quarter(
        x_tile, square_tile, g1, squares, row_ok, square_ok, k + Q, rk, k_valid, NORM, MASK_K, UPCAST, BM
    )
    c, squares = load_quarter(
        x_tile, square_tile, g2, squares, row_ok, square_ok, k + 2 * Q, rk, k_valid, NORM, MASK_K, UPCAST, BM
    )
    d, squares = load_quarter(
        x_tile, square_tile, g3, squares, row_ok, square_ok, k + 3 * Q, rk, k_valid, NORM, MASK_K, UPCAST, BM
    )
    return a, b, c, d, squares


@triton.jit
def int4_product(
    x,
    w_tile,
    scale,
    zero,
    group_stride,
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
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    UPCAST: tl.constexpr,
    SM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """As `product.int8_product`, the sum scaled: w_tile [BK / 4, BN] points at words, scale and zero [BN] at the values
    of the first group; those of the next lie `group_stride` further. BK: see `configs.int4_block_k`."""
    Q: tl.constexpr = BK // 4
    GROUPS: tl.constexpr = BK // GROUP
    rk = tl.arange(0, Q)
    row_ok = rm < M
    x_tile = x + rm.to(tl.int64)[:, None] * x_stride + rk[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    squares = tl.zeros((SM, Q), dtype=tl.float32)
    square_rows = tl.min(rm, 0) + tl.arange(0, SM)
    square_ok = square_rows < M
    square_tile = x + square_rows.to(tl.int64)[:, None] * x_stride + rk[None, :]
    # Scales and gains of the next step are on their way while this one computes, as in `product.int8_product`.
    ok = column_ok & (k_begin < k_end)
    s0, s1, s2, s3 = load_groups(scale, k_begin // GROUP, group_stride, ok, GROUPS)
    z0, z1, z2, z3 = s0, s1, s2, s3
    if ZERO:
        z0, z1, z2, z3 = load_groups(zero, k_begin // GROUP, group_stride, ok, GROUPS)
    g0, g1, g2, g3 = rk, rk, rk, rk
    if NORM:
        g0, g1, g2, g3 = load_block_gains(norm_weight, rk, k_begin, k_end, k_valid, MASK_K)
    for k in range(k_begin, k_end, BK):
        words = tl.load(w_tile + word_index(k), mask=column_ok[None, :], other=0)
        a0, a1, a2, a3, squares = load_block(
            x_tile, square_tile, g0, g1, g2, g3, squares, row_ok, square_ok, k, rk, k_valid, NORM, MASK_K, UPCAST, BM
        )
        ok = column_ok & (k + BK < k_end)
        t0, t1, t2, t3 = load_groups(scale, (k + BK) // GROUP, group_stride, ok, GROUPS)
        acc = add_block(acc, a0, a1, a2, a3, words, s0, s1, s2, s3, z0, z1, z2, z3, GROUPS, ZERO, UPCAST)
        s0, s1, s2, s3 = t0, t1, t2, t3
        if ZERO:
            z0, z1, z2, z3 = load_groups(zero, (k + BK) // GROUP, group_stride, ok, GROUPS)
        if NORM:
            g0, g1, g2, g3 = load_block_gains(norm_weight, rk, k + BK, k_end, k_valid, MASK_K)
    return acc, sum_squares(squares, BM)
