"""Matrix product y = x W^T + bias of int8 or int4 weights and float activations, float32 accumulation.

One kernel for few and many rows: the tile decides. A norm of the input and the addition to the residual stream are
folded in. Where a matrix has too few columns to keep every multiprocessor busy, several programs share its K: each
leaves a float32 share in a workspace, and the last to arrive adds them up in their order (no float atomics: the bits
do not depend on who comes last).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import TileConfig
from kernels.gpu.int4_product import int4_product, word_index
from kernels.gpu.launch import GpuContext, check_input, masks_k, square_rows
from kernels.gpu.layout import PackedMatrix, packed_constants
from kernels.gpu.primitives import arrive_last
from kernels.gpu.product import int8_product, inverse_rms, store_partial, sum_partials
from kernels.ops import Norm

_GROUP_M = 8  # tiles of rows that walk over the weights together, so that both stay in the L2 cache


@triton.jit
def _store_tile(
    out, acc, squares, scale, bias, rm, rn, M, N, out_stride, norm_len, eps,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out [M, N] at rows rm, columns rn = product (* scale) / rms + bias; with ADD that is added to what is there."""
    column_ok = rn < N
    ok = (rm < M)[:, None] & column_ok[None, :]
    y = acc
    if SCALE:
        y = y * tl.load(scale + rn, mask=column_ok, other=0.0)[None, :]
    if NORM:
        y = y * inverse_rms(squares, norm_len, eps)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + rn, mask=column_ok, other=0.0)[None, :]
    to = out + rm.to(tl.int64)[:, None] * out_stride + rn[None, :]
    if ADD:
        y += tl.load(to, mask=ok, other=0.0).to(tl.float32)
    tl.store(to, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M"])
def packed_linear_kernel(
    x,
    weight,
    scale,
    zero,
    bias,
    norm_weight,
    out,
    partial,
    counters,
    M,
    N,
    K,
    x_stride,
    out_stride,
    k_valid,
    eps,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    MASK_K: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per (tile of out [M, N], slice of K); x [M, >= k_valid] has rows x_stride apart, weight is [N, K].

    GROUP: inputs of a scale of int4 weights, scale and zero [K / GROUP, N]; 0 means int8, scale [N]. GROUP_M row tiles
    walk together over the column tiles. partial: SPLIT_K shares per tile, counters: zeros.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    per_group = GROUP_M * tiles_n
    first_m = (pid // per_group) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BM) - first_m, GROUP_M)
    rm = (first_m + (pid % per_group) % group_m) * BM + tl.arange(0, BM)
    rn = ((pid % per_group) // group_m) * BN + tl.arange(0, BN)

    k_begin = 0
    k_end = K
    if SPLIT_K > 1:
        k_len = tl.cdiv(K // BK, SPLIT_K) * BK
        k_begin = tl.program_id(1) * k_len
        k_end = tl.minimum(k_begin + k_len, K)
    if GROUP:
        w_tile = weight + rn.to(tl.int64)[None, :] * word_index(K) + tl.arange(0, BK // 4)[:, None]
        acc, squares = int4_product(
            x, w_tile, scale + rn, zero + rn, N, norm_weight, rm, rn < N, M, x_stride, k_begin, k_end, k_valid, NORM,
            MASK_K, GROUP, ZERO, UPCAST, SM, BM, BN, BK,
        )  # fmt: skip
    else:
        w_tile = weight + rn.to(tl.int64)[None, :] * K + tl.arange(0, BK)[:, None]
        acc, squares = int8_product(
            x, w_tile, norm_weight, rm, rn < N, M, x_stride, k_begin, k_end, k_valid, NORM, MASK_K, MAGIC, UPCAST,
            SM, BM, BN, BK,
        )  # fmt: skip
    if SPLIT_K > 1:
        shares = partial + pid.to(tl.int64) * SPLIT_K * (BM * BN + BM)
        store_partial(shares + tl.program_id(1) * (BM * BN + BM), acc, squares, rm < M, BM, BN)
        if arrive_last(counters + pid, SPLIT_K):
            acc, squares = sum_partials(shares, SPLIT_K, rm < M, BM, BN)
            _store_tile(
                out, acc, squares, scale, bias, rm, rn, M, N, out_stride, k_valid, eps, GROUP == 0, HAS_BIAS, NORM, ADD
            )
    else:
        _store_tile(
            out, acc, squares, scale, bias, rm, rn, M, N, out_stride, k_valid, eps, GROUP == 0, HAS_BIAS, NORM, ADD
        )


def packed_linear(
    gpu: GpuContext,
    x: Tensor,
    matrix: PackedMatrix,
    out_dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    add_to: Tensor | None = None,
    tile: TileConfig | None = None,
) -> Tensor:
    """x [T, in] -> [T, rows of the matrix] in `out_dtype`, or added to `add_to` [T, rows] (columns of a wider tensor if
    need be), which is returned.

    x may also be a [T, in] view whose rows are the padded width apart, with zeros between (what gate_up writes). With
    `norm` x is normed first, which is worth it for few rows: each program repeats the arithmetic of its rows.
    Raises ValueError for an x of another width.
    """
    check_input(x, matrix)
    num_rows = x.shape[0]
    out = add_to if add_to is not None else torch.empty(num_rows, matrix.rows, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    if out.stride(1) != 1 or tuple(out.shape) != (num_rows, matrix.rows):
        raise ValueError(f"{tuple(out.shape)} cannot take [{num_rows}, {matrix.rows}] added to it")
    group, zero, magic = packed_constants(matrix)
    if tile is None:
        tile = gpu.tile("linear" if norm is None else "normed", num_rows, matrix.rows, matrix.width, group)
    tiles = -(-num_rows // tile.block_m) * -(-matrix.rows // tile.block_n)
    split = gpu.num_splits(tile, tiles)
    packed_linear_kernel[(tiles, split)](
        x,
        matrix.weight,
        matrix.scale,
        matrix.scale if zero is None else zero,
        matrix.scale if matrix.bias is None else matrix.bias,
        matrix.scale if norm is None else norm.weight,
        out,
        gpu.partials(tiles * split * tile.block_m * (tile.block_n + 1)) if split > 1 else matrix.scale,
        gpu.counters,
        num_rows,
        matrix.rows,
        matrix.width,
        x.stride(0),
        out.stride(0),
        x.shape[1],
        0.0 if norm is None else norm.eps,
        GROUP=group,
        ZERO=zero is not None,
        HAS_BIAS=matrix.bias is not None,
        NORM=norm is not None,
        ADD=add_to is not None,
        MASK_K=masks_k(x, matrix),
        MAGIC=magic,
        UPCAST=gpu.interpreted,
        GROUP_M=_GROUP_M,
        SPLIT_K=split,
        SM=square_rows(tile, num_rows),
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
