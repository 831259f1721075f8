"""One block of cached tokens in an online softmax: what decode and prefill attention have in common.

Not a kernel: it is inlined into the two that call it, which differ in the rows they hold and in what those may see.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.primitives import dequantize, dot


@triton.jit
def attend_block(
    query,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    table,
    j,
    ok,
    seen,
    top,
    total,
    acc,
    scale_log2,
    slot_stride,
    head_stride,
    kv_head,
    num_kv_heads,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows of `query` [ROWS, D_PAD] over the cached tokens `j` [BLOCK] of one sequence (page numbers at `table`).

    `ok` [BLOCK]: tokens that exist; `seen` [ROWS or 1, BLOCK]: those a row may look at. Returns the running maximum
    `top` [ROWS] (of scores times log2 e), the sum of weights `total` [ROWS] and the weighted values `acc`
    [ROWS, D_PAD] (Milakov & Gimelshein 2018, algorithm 3). int8 keys: the scale of a token multiplies its score;
    int8 values: its weight.
    """
    d = tl.arange(0, D_PAD)
    page = tl.load(table + j // PAGE, mask=ok, other=0).to(tl.int64)
    slot = page * PAGE + j % PAGE
    at = slot * slot_stride + kv_head * head_stride
    keys = tl.load(k_cache + at[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0)
    keys = dequantize(keys, query.dtype, False, UPCAST)
    scores = dot(query, keys, tl.zeros((ROWS, BLOCK), dtype=tl.float32), UPCAST) * scale_log2
    if INT8:
        scale_at = slot * num_kv_heads + kv_head
        scores = scores * tl.load(k_scale + scale_at, mask=ok, other=0.0)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet (outside the window)
    probs = tl.exp2(scores - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    values = tl.load(v_cache + at[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0)
    values = dequantize(values, query.dtype, False, UPCAST)
    total = total * shrink + tl.sum(probs, 1)
    if INT8:
        # Relative to the largest scale of the block: probability * scale alone would underflow in fp16.
        steps = tl.load(v_scale + scale_at, mask=ok, other=0.0)
        largest = tl.maximum(tl.max(steps, 0), 1e-30)
        probs = probs * (steps / largest)[None, :]
        product = dot(probs.to(query.dtype), values, tl.zeros((ROWS, D_PAD), dtype=tl.float32), UPCAST)
        acc = acc * shrink[:, None] + product * largest
    else:
        acc = dot(probs.to(query.dtype), values, acc * shrink[:, None], UPCAST)
    return new_top, total, acc
