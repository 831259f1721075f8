"""W8A16 matrix product y = (x Q^T) * scale + bias: int8 weights, float activations, float32 accumulation.

One kernel for few and many rows (the tile decides) and for up to three matrices in one launch: either all read the
same input (first factors of q, k, v), or each reads what a launch before it wrote (second factors).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import int8_linear_config
from kernels.gpu.layout import Int8Matrices
from kernels.gpu.primitives import dequantize, dot

_GROUP_M = 8  # tiles of rows that walk over the weights together, so that both stay in the L2 cache


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    M,
    x_stride,
    k_valid,
    n0,
    n1,
    n2,
    k0,
    k1,
    k2,
    x0,
    x1,
    x2,
    HAS_BIAS: tl.constexpr,
    MASK_K: tl.constexpr,
    CHAINED: tl.constexpr,
    GROUPS: tl.constexpr,
    MAGIC: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[M * (columns before i) + row * n_i + j]: matrix i of `GROUPS`, one program per tile of any of them.

    x: [M, >= k_valid] rows x_stride apart; with CHAINED instead matrix i reads [M, k_i] dense at M * x_i.
    """
    # Tiles: GROUP_M row tiles walk together over the column tiles of all matrices.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles0 = tl.cdiv(n0, BN)
    tiles_n = tiles0
    if GROUPS > 1:
        tiles1 = tl.cdiv(n1, BN)
        tiles_n = tiles0 + tiles1 + tl.cdiv(n2, BN)
    per_group = GROUP_M * tiles_n
    first_m = (pid // per_group) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % per_group) % group_m
    tile_n = (pid % per_group) // group_m

    # Which matrix this tile belongs to: its shape, its first weight, its first output column.
    n = n0
    k_len = k0
    columns = 0
    x_first = x0
    weight_first = tl.cast(0, tl.int64)
    if GROUPS > 1:
        in1 = (tile_n >= tiles0) & (tile_n < tiles0 + tiles1)
        in2 = tile_n >= tiles0 + tiles1
        tile_n = tile_n - tl.where(in2, tiles0 + tiles1, tl.where(in1, tiles0, 0))
        n = tl.where(in2, n2, tl.where(in1, n1, n0))
        k_len = tl.where(in2, k2, tl.where(in1, k1, k0))
        columns = tl.where(in2, n0 + n1, tl.where(in1, n0, 0))
        x_first = tl.where(in2, x2, tl.where(in1, x1, x0))
        first1 = tl.cast(n0, tl.int64) * k0
        weight_first = tl.where(in2, first1 + tl.cast(n1, tl.int64) * k1, tl.where(in1, first1, 0))
        k_len = tl.multiple_of(k_len, 128)
        weight_first = tl.multiple_of(weight_first, 128)

    rm = tile_m * BM + tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    row_ok = rm < M
    column_ok = rn < n
    rows = rm.to(tl.int64)
    if CHAINED:
        x_first = tl.multiple_of(x_first, 128)
        x_tile = x + M.to(tl.int64) * x_first + rows[:, None] * k_len + rk[None, :]
    else:
        x_tile = x + rows[:, None] * x_stride + rk[None, :]
    w_tile = weight + weight_first + rn.to(tl.int64)[None, :] * k_len + rk[:, None]

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, k_len, BK):
        if MASK_K:
            a = tl.load(x_tile, mask=row_ok[:, None] & (rk[None, :] + k < k_valid), other=0.0)
        else:
            a = tl.load(x_tile, mask=row_ok[:, None], other=0.0)
        w = tl.load(w_tile, mask=column_ok[None, :], other=0)
        acc = dot(a, dequantize(w, a.dtype, MAGIC, UPCAST), acc, UPCAST)
        x_tile += BK
        w_tile += BK

    acc = acc * tl.load(scale + columns + rn, mask=column_ok, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns + rn, mask=column_ok, other=0.0)[None, :]
    out_tile = out + M.to(tl.int64) * columns + rows[:, None] * n + rn[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def int8_linear(x: Tensor, matrices: Int8Matrices, out_dtype: torch.dtype) -> Tensor:
    """x [T, in] times every matrix of the group -> flat buffer of dense [T, rows[i]] blocks, in `out_dtype`.

    x may also be a [T, in] view whose rows are the padded width apart, with zeros between (what gate_up writes).
    """
    padded = x.stride(0) == matrices.widths[0]
    if x.shape[1] != matrices.in_features[0] or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; [T, {matrices.in_features[0]}] with dense rows is needed")
    mask_k = not padded and x.shape[1] != matrices.widths[0]
    return _launch(x, matrices, out_dtype, x.shape[0], x.stride(0), x.shape[1], mask_k, None)


def int8_linear_chained(
    x: Tensor, num_rows: int, x_columns: tuple[int, ...], matrices: Int8Matrices, out_dtype: torch.dtype
) -> Tensor:
    """Matrix i times the dense [T, widths[i]] block at element T * x_columns[i] of flat x -> flat, as `int8_linear`.

    x_columns are multiples of 128: the kernel loads 16 bytes at once.
    """
    return _launch(x, matrices, out_dtype, num_rows, 0, 0, False, x_columns)


def split_columns(flat: Tensor, num_rows: int, columns: tuple[int, ...]) -> list[Tensor]:
    """Flat buffer of blocks [num_rows, columns[i]] -> its blocks, each contiguous."""
    blocks = flat.split([num_rows * n for n in columns])
    return [block.view(num_rows, n) for block, n in zip(blocks, columns, strict=True)]


def _launch(
    x: Tensor,
    matrices: Int8Matrices,
    out_dtype: torch.dtype,
    num_rows: int,
    x_stride: int,
    k_valid: int,
    mask_k: bool,
    x_columns: tuple[int, ...] | None,
) -> Tensor:
    out = torch.empty(num_rows * sum(matrices.rows), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    interpreted = x.device.type == "cpu"
    tile = int8_linear_config(num_rows, x.dtype, interpreted)
    rows = (*matrices.rows, 0, 0)
    widths = (*matrices.widths, 0, 0)
    starts = (*(x_columns or ()), 0, 0, 0)
    tiles_n = sum(-(-n // tile.block_n) for n in matrices.rows)
    int8_linear_kernel[(-(-num_rows // tile.block_m) * tiles_n,)](
        x,
        matrices.weight,
        matrices.scale,
        matrices.scale if matrices.bias is None else matrices.bias,
        out,
        num_rows,
        x_stride,
        k_valid,
        rows[0],
        rows[1],
        rows[2],
        widths[0],
        widths[1],
        widths[2],
        starts[0],
        starts[1],
        starts[2],
        HAS_BIAS=matrices.bias is not None,
        MASK_K=mask_k,
        CHAINED=x_columns is not None,
        GROUPS=1 if len(matrices.rows) == 1 else 3,
        MAGIC=matrices.magic,
        UPCAST=interpreted,
        GROUP_M=_GROUP_M,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
