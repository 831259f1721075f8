"""Rows of an int8 embedding table, dequantized."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.layout import Int8Matrix
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


def embedding(token_ids: Tensor, table: Int8Matrix, dtype: torch.dtype) -> Tensor:
    """token_ids int64 [T] -> [T, hidden] in `dtype`."""
    n = table.in_features
    out = torch.empty(token_ids.shape[0], n, dtype=dtype, device=token_ids.device)
    if out.numel():
        block = min(_BLOCK, 1 << (n - 1).bit_length())
        embedding_kernel[(token_ids.shape[0], -(-n // block))](
            token_ids, table.weight, table.scale, out, n, table.width, MAGIC=table.magic, BLOCK=block, num_warps=4
        )
    return out
