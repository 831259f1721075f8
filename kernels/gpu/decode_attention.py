"""Attention of one new token per sequence over the paged cache: split along the context and merged in one launch.

Splits have a fixed length, so a result does not depend on the other sequences of a batch and one CUDA graph, made
for the longest context, serves shorter ones: programs past the end of a sequence leave at once, and nothing is read
back to the host. Online softmax: Milakov & Gimelshein 2018; split and merge: Dao et al. 2023 (flash-decoding).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_block import attend_block
from kernels.gpu.configs import SPLIT_LEN, decode_config, next_power_of_2
from kernels.gpu.launch import GpuContext
from kernels.gpu.primitives import arrive_last
from kernels.ops import AttentionBatch, LayerKv

_LOG2_E = 1.4426950408889634
_MERGE_BLOCK = 16  # splits merged at a time


@triton.jit
def _merged_head(partial, partial_lse, cell, used, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [D_PAD]: mean of the `used` splits from `cell` on, weighted by 2^lse, in their order."""
    d = tl.arange(0, D_PAD)
    top = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    acc = tl.zeros((D_PAD,), dtype=tl.float32)
    for start in range(0, used, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i < used
        lse = tl.load(partial_lse + cell + i, mask=ok, other=float("-inf"), cache_modifier=".cg")
        at = partial + (cell + i)[:, None] * D + d[None, :]
        means = tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        share = tl.exp2(lse - safe_top)
        shrink = tl.exp2(top - safe_top)
        acc = acc * shrink + tl.sum(means * share[:, None], 0)
        total = total * shrink + tl.sum(share, 0)
        top = new_top
    return acc / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=["num_splits", "window"])
def decode_attention_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_tables,
    context_lens,
    out,
    partial,
    partial_lse,
    counters,
    scale_log2,
    q_stride,
    slot_stride,
    head_stride,
    table_stride,
    num_q_heads,
    num_kv_heads,
    num_splits,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    INT8: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIRECT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program per (sequence, key/value head, split): the GROUP query heads of that head over SPLIT tokens.

    partial [S, HQ, num_splits, D] gets the weighted mean of values, partial_lse its log2-sum-exp; the last program of
    a head to arrive merges them into `out`, MERGE at a time. With DIRECT (one split) `out` gets the result. int8
    keys: the scale of a token multiplies its score; values: its probability.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, context)
    first = begin
    if WINDOWED:
        first = tl.maximum(begin, context - window)
        first = (first // BLOCK) * BLOCK
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    row_ok = (g < GROUP)[:, None] & (d < D)[None, :]
    heads = kv_head * GROUP + g
    if begin < context:
        query = tl.load(q + sequence * q_stride + heads[:, None] * D + d[None, :], mask=row_ok, other=0.0)
        top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, D_PAD), dtype=tl.float32)
        for start in range(first, end, BLOCK):
            j = start + tl.arange(0, BLOCK)
            ok = j < end
            seen = ok & (j >= context - window) if WINDOWED else ok
            top, total, acc = attend_block(
                query,
                k_cache,
                v_cache,
                k_scale,
                v_scale,
                block_tables + sequence * table_stride,
                j,
                ok,
                seen[None, :],
                top,
                total,
                acc,
                scale_log2,
                slot_stride,
                head_stride,
                kv_head,
                num_kv_heads,
                ROWS,
                PAGE,
                D,
                D_PAD,
                BLOCK,
                INT8,
                UPCAST,
            )
        total_safe = tl.where(total > 0, total, 1.0)
        mean = acc / total_safe[:, None]
        if DIRECT:
            to = out + (sequence * num_q_heads + heads)[:, None] * D + d[None, :]
            tl.store(to, mean.to(out.dtype.element_ty), mask=row_ok)
        else:
            cell = (sequence * num_q_heads + heads) * num_splits + split
            tl.store(partial + cell[:, None] * D + d[None, :], mean, mask=row_ok, cache_modifier=".cg")
            lse = tl.where(total > 0, top + tl.log2(total_safe), float("-inf"))
            tl.store(partial_lse + cell, lse, mask=g < GROUP, cache_modifier=".cg")
            used = tl.cdiv(context, SPLIT)
            if arrive_last(counters + sequence * num_kv_heads + kv_head, used):
                for h in range(GROUP):
                    head = sequence * num_q_heads + kv_head * GROUP + h
                    merged = _merged_head(partial, partial_lse, head * num_splits, used, D, D_PAD, MERGE)
                    tl.store(out + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    elif split == 0:  # an empty sequence that pads a batch
        to = out + (sequence * num_q_heads + heads)[:, None] * D + d[None, :]
        tl.store(to, tl.zeros((ROWS, D_PAD), dtype=tl.float32).to(out.dtype.element_ty), mask=row_ok)


def decode_attention(
    gpu: GpuContext, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None, out: Tensor
) -> None:
    """The first `batch.num_decodes` rows of q [T, HQ, D] over the cache into those of out [T, HQ, D] (contiguous).

    Raises ValueError for more sequences times heads than there are counters (65,536).
    """
    num_sequences, num_q_heads, head_dim = batch.num_decodes, q.shape[1], q.shape[2]
    num_kv_heads = kv.key.shape[1]
    group = num_q_heads // num_kv_heads
    tile = decode_config(group, head_dim)
    num_splits = max(1, -(-batch.max_context_len // SPLIT_LEN))
    direct = num_splits == 1
    head_pad = max(16, next_power_of_2(head_dim))
    partial, lse = out, out
    if not direct:
        cells = (num_sequences, num_q_heads, num_splits)
        if num_sequences * num_kv_heads > gpu.counters.numel():
            raise ValueError(f"{num_sequences} sequences of {num_kv_heads} heads are more than {gpu.counters.numel()}")
        partial = torch.empty(*cells, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(cells, dtype=torch.float32, device=q.device)
    decode_attention_kernel[(num_sequences, num_kv_heads, num_splits)](
        q,
        kv.key,
        kv.value,
        kv.key if kv.key_scale is None else kv.key_scale,
        kv.value if kv.value_scale is None else kv.value_scale,
        batch.block_tables,
        batch.context_lens,
        out,
        partial,
        lse,
        gpu.counters,
        scale * _LOG2_E,
        q.stride(0),
        kv.key.stride(0),
        kv.key.stride(1),
        batch.block_tables.stride(0),
        num_q_heads,
        num_kv_heads,
        num_splits,
        0 if window is None else window,
        GROUP=group,
        ROWS=tile.block_rows,
        PAGE=batch.block_size,
        D=head_dim,
        D_PAD=head_pad,
        BLOCK=tile.block_len,
        SPLIT=SPLIT_LEN,
        MERGE=_MERGE_BLOCK,
        INT8=kv.key_scale is not None,
        WINDOWED=window is not None,
        DIRECT=direct,
        UPCAST=gpu.interpreted,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
