"""From the residual stream (or the first factors) to rotated queries and cached keys and values, in one launch.

For the few rows of a decode step. A head is a unit of work: several programs take its columns (BN each) and slices of
K, leave float32 shares in a workspace, and the last to arrive has the whole head in front of it, as norms, rotation
and int8 scales need.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import TileConfig, next_power_of_2
from kernels.gpu.head_layout import HeadFactors
from kernels.gpu.heads import check_heads, head_arguments, head_constants, head_scalars, write_heads
from kernels.gpu.int4_product import int4_product, word_index
from kernels.gpu.launch import GpuContext, square_rows
from kernels.gpu.primitives import arrive_last
from kernels.gpu.product import int8_product, inverse_rms
from kernels.ops import HeadTransform, LayerKv, Norm

_EPILOGUE_ROWS = 16  # tokens of a head at a time: more would not fit the registers


@triton.jit
def _finished_half(
    shares, squares, scale, bias, local, column, row_ok, i_ok, norm_len, eps, SPLIT_K: tl.constexpr,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Shares of columns `column` [HALF_PAD] of a head added up in their order, scaled: float32 [R, HALF_PAD]."""
    ok = row_ok[:, None] & i_ok[None, :]
    y = tl.zeros((R, HALF_PAD), dtype=tl.float32)
    for s in range(SPLIT_K):
        y += tl.load(
            shares + s * SHARE + local[:, None] * WIDTH + column[None, :], mask=ok, other=0.0, cache_modifier=".cg"
        )
    if SCALE:
        y = y * tl.load(scale + column, mask=i_ok, other=0.0)[None, :]
    if NORM:
        y = y * inverse_rms(squares, norm_len, eps)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=i_ok, other=0.0)[None, :]
    return y


@triton.jit(do_not_specialize=["M"])
def head_linear_kernel(
    x,
    weight,
    scale,
    zero,
    bias,
    norm_weight,
    q_norm,
    k_norm,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slots,
    partial,
    counters,
    M,
    x_stride,
    k_valid,
    k0,
    k1,
    k2,
    x0,
    x1,
    x2,
    eps,
    num_q_heads,
    num_kv_heads,
    slot_stride,
    head_stride,
    q_eps,
    k_eps,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    CHAINED: tl.constexpr,
    MASK_K: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INT8: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per (head, BN of its columns; slice of K; tile of tokens).

    weight: rows of q [num_q_heads * D, k0], k [num_kv_heads * D, k1], v [.., k2] one after the other; scale and bias:
    one entry per row. Without CHAINED all read x [M, k_valid]; with it projection i reads x[:, x_i : x_i + k_i], or,
    where k_i is 0, is already there: x[:, x_i :] (its scale is 1). With GROUP the weights are int4, scale and zero hold
    one entry per group and row: [k / GROUP, rows], where CHAINED of each projection after the other. partial: SPLIT_K
    shares per head and tile.
    """
    D: tl.constexpr = 2 * HALF
    SUBS: tl.constexpr = (D + BN - 1) // BN
    WIDTH: tl.constexpr = SUBS * BN
    SHARE: tl.constexpr = BM * WIDTH + BM
    head = tl.program_id(0) // SUBS
    sub = tl.program_id(0) % SUBS
    split = tl.program_id(1)
    local = tl.arange(0, BM)
    rm = tl.program_id(2) * BM + local
    column = sub * BN + tl.arange(0, BN)

    # Which projection: where its weights begin, how long its rows are, what it reads.
    is_k = (head >= num_q_heads) & (head < num_q_heads + num_kv_heads)
    is_v = head >= num_q_heads + num_kv_heads
    in_projection = head - tl.where(is_v, num_q_heads + num_kv_heads, tl.where(is_k, num_q_heads, 0))
    k_len = k0
    weight_first = tl.cast(0, tl.int64)
    x_product = x
    if CHAINED:
        k_len = tl.where(is_v, k2, tl.where(is_k, k1, k0))
        first_k = tl.cast(num_q_heads, tl.int64) * D * k0
        first_v = first_k + tl.cast(num_kv_heads, tl.int64) * D * k1
        weight_first = tl.where(is_v, first_v, tl.where(is_k, first_k, 0))
        x_first = tl.where(is_v, x2, tl.where(is_k, x1, x0))
        # Factors begin at multiples of 128; the hints keep their loads 16 bytes wide.
        k_len = tl.multiple_of(k_len, 128)
        weight_first = tl.multiple_of(weight_first, 128)
        x_product = x + tl.multiple_of(tl.where(k_len > 0, x_first, 0), 128)
    else:
        weight_first = tl.cast(head - in_projection, tl.int64) * D * k_len
    w_row = in_projection * D + column
    w_rows = w_row.to(tl.int64)[None, :]

    slice_len = tl.cdiv(k_len // BK, SPLIT_K) * BK
    k_begin = split * slice_len
    k_end = tl.minimum(k_begin + slice_len, k_len)
    if GROUP:
        group_at = head * D + column
        group_stride = (num_q_heads + 2 * num_kv_heads) * D
        if CHAINED:
            group_at = tl.cast(weight_first // GROUP, tl.int32) + w_row
            group_stride = tl.where(is_k | is_v, num_kv_heads, num_q_heads) * D
        w_tile = weight + word_index(weight_first) + w_rows * word_index(k_len) + tl.arange(0, BK // 4)[:, None]
        acc, squares = int4_product(
            x_product, w_tile, scale + group_at, zero + group_at, group_stride, norm_weight, rm, column < D, M,
            x_stride, k_begin, k_end, k_valid, NORM, MASK_K, GROUP, ZERO, UPCAST, SM, BM, BN, BK,
        )  # fmt: skip
    else:
        w_tile = weight + weight_first + w_rows * k_len + tl.arange(0, BK)[:, None]
        acc, squares = int8_product(
            x_product, w_tile, norm_weight, rm, column < D, M, x_stride, k_begin, k_end, k_valid, NORM, MASK_K, MAGIC,
            UPCAST, SM, BM, BN, BK,
        )  # fmt: skip
    if CHAINED:  # noqa: SIM102 (a constant and a run-time condition)
        if (k_len == 0) & (split == 0):
            there = x + rm.to(tl.int64)[:, None] * x_stride + (x_first + w_row)[None, :]
            acc = tl.load(there, mask=(rm < M)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)

    unit = tl.program_id(2) * (num_q_heads + 2 * num_kv_heads) + head
    shares = partial + unit.to(tl.int64) * SPLIT_K * SHARE
    mine = shares + split * SHARE
    tl.store(mine + local[:, None] * WIDTH + column[None, :], acc, mask=(rm < M)[:, None], cache_modifier=".cg")
    if NORM:  # noqa: SIM102
        if sub == 0:  # the others of this slice have the same
            tl.store(mine + BM * WIDTH + local, squares, mask=rm < M, cache_modifier=".cg")
    if arrive_last(counters + unit, SUBS * SPLIT_K):
        i = tl.arange(0, HALF_PAD)
        for begin in range(0, BM, ROWS):
            r = begin + tl.arange(0, ROWS)
            row = tl.program_id(2) * BM + r
            ok = row < M
            rms = tl.zeros((ROWS,), dtype=tl.float32)
            if NORM:
                for s in range(SPLIT_K):
                    rms += tl.load(shares + s * SHARE + BM * WIDTH + r, mask=ok, other=0.0, cache_modifier=".cg")
            a = _finished_half(
                shares, rms, scale + head * D, bias + head * D, r, i, ok, i < HALF, k_valid, eps, SPLIT_K, SHARE,
                WIDTH, GROUP == 0, NORM, HAS_BIAS, ROWS, HALF_PAD,
            )  # fmt: skip
            b = _finished_half(
                shares, rms, scale + head * D, bias + head * D, r, i + HALF, ok, i < HALF, k_valid, eps, SPLIT_K, SHARE,
                WIDTH, GROUP == 0, NORM, HAS_BIAS, ROWS, HALF_PAD,
            )  # fmt: skip
            write_heads(
                a, b, row.to(tl.int64), ok, head, q_norm, k_norm, cos, sin, q_out, k_cache, v_cache, k_scale, v_scale,
                slots, num_q_heads, num_kv_heads, slot_stride, head_stride, q_eps, k_eps, Q_NORM, K_NORM, INT8, HALF,
                HALF_PAD,
            )  # fmt: skip


def head_linear(
    gpu: GpuContext,
    x: Tensor,
    factors: HeadFactors,
    heads: HeadTransform,
    kv: LayerKv,
    slots: Tensor,
    *,
    norm: Norm | None = None,
    tile: TileConfig | None = None,
) -> Tensor:
    """x [T, in] (the residual stream with its norm, or what the first factors made) -> rotated q [T, HQ, D].

    Keys and values go to `slots` of the cache. Raises ValueError as `check_heads` and for an x of another width.
    """
    num_rows, head_dim = x.shape[0], kv.key.shape[2]
    check_heads(heads, kv, num_rows)
    if x.shape[1] != factors.in_features or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; [T, {factors.in_features}] with dense rows is needed")
    num_q_heads, num_kv_heads = factors.rows[0] // head_dim, factors.rows[1] // head_dim
    out = torch.empty(num_rows, num_q_heads, head_dim, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    chained = factors.starts is not None
    num_heads = num_q_heads + 2 * num_kv_heads
    if tile is None:
        tile = gpu.tile("heads", num_rows, sum(factors.rows), max(factors.widths), factors.group)
    block_n = min(tile.block_n, max(16, next_power_of_2(head_dim)))
    subs, tiles_m = -(-head_dim // block_n), -(-num_rows // tile.block_m)
    units = num_heads * tiles_m
    share = tile.block_m * (subs * block_n + 1)
    head_linear_kernel[(num_heads * subs, tile.split_k, tiles_m)](
        x,
        factors.weight,
        factors.scale,
        factors.scale if factors.zero is None else factors.zero,
        factors.scale if factors.bias is None else factors.bias,
        factors.scale if norm is None else norm.weight,
        *head_arguments(heads, kv, slots, out),
        gpu.partials(units * tile.split_k * share),
        gpu.counters,
        num_rows,
        x.stride(0),
        x.shape[1],
        *factors.widths,
        *(factors.starts or (0, 0, 0)),
        0.0 if norm is None else norm.eps,
        num_q_heads,
        num_kv_heads,
        *head_scalars(heads, kv),
        GROUP=factors.group,
        ZERO=factors.zero is not None,
        HAS_BIAS=factors.bias is not None,
        NORM=norm is not None,
        CHAINED=chained,
        MASK_K=not chained and x.shape[1] != factors.widths[0],
        **head_constants(heads, kv),
        MAGIC=factors.magic,
        UPCAST=gpu.interpreted,
        SPLIT_K=tile.split_k,
        SM=square_rows(tile, num_rows),
        BM=tile.block_m,
        BN=block_n,
        BK=tile.block_k,
        ROWS=tile.block_m if gpu.interpreted else min(_EPILOGUE_ROWS, tile.block_m),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
