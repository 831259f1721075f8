"""Rows of an embedding table of integers, dequantized."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import int4_block_k
from kernels.gpu.layout import Int4Matrix, PackedMatrix
from kernels.gpu.primitives import dequantize

_BLOCK = 1024


@triton.jit
def embedding_kernel(token_ids, weight, scale, out, n, stride, MAGIC: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, n] = weight[token, :n] * scale[token]; rows of the table lie `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    row = tl.load(token_ids + token)
    w = dequantize(tl.load(weight + row * stride + i, mask=ok, other=0), tl.float32, MAGIC, False)
    y = w.to(tl.float32) * tl.load(scale + row)
    tl.store(out + token * n + i, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def int4_embedding_kernel(
    token_ids, weight, scale, zero, out, n, stride, rows, GROUP: tl.constexpr, ZERO: tl.constexpr, BK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, n] = (q - zero) * scale of row token; rows of words lie `stride` apart, scale and zero are [.., rows]."""
    Q: tl.constexpr = BK // 4
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    row = tl.load(token_ids + token)
    word = tl.load(weight + row * stride + (i // BK) * Q + i % Q, mask=ok, other=0).to(tl.int32)
    q = (word >> (i % BK // Q * 4)) & 15  # the sign of the word ends in the bits that are cut off
    at = (i // GROUP).to(tl.int64) * rows + row
    offset = tl.full((BLOCK,), 8, tl.int32)
    if ZERO:
        offset = tl.load(zero + at, mask=ok, other=0).to(tl.int32)
    y = (q - offset).to(tl.float32) * tl.load(scale + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * n + i, y.to(out.dtype.element_ty), mask=ok)


def embedding(token_ids: Tensor, table: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """token_ids int64 [T] -> [T, hidden] in `dtype`."""
    n = table.in_features
    out = torch.empty(token_ids.shape[0], n, dtype=dtype, device=token_ids.device)
    if not out.numel():
        return out
    block = min(_BLOCK, 1 << (n - 1).bit_length())
    grid = (token_ids.shape[0], -(-n // block))
    if isinstance(table, Int4Matrix):
        int4_embedding_kernel[grid](
            token_ids,
            table.weight,
            table.scale,
            table.weight if table.zero is None else table.zero,
            out,
            n,
            table.width // 4,
            table.rows,
            GROUP=table.group,
            ZERO=table.zero is not None,
            BK=int4_block_k(table.group),
            BLOCK=block,
            num_warps=4,
        )
    else:
        embedding_kernel[grid](
            token_ids, table.weight, table.scale, out, n, table.width, MAGIC=table.magic, BLOCK=block, num_warps=4
        )
    return out
