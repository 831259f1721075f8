"""Causal attention of prompt chunks over the paged cache: sequences of any length, with or without earlier context.

The keys and values of the chunk itself are read back from the cache, where `rotary_store` put them: one source for
old and new tokens, at the price of one read. FlashAttention-2's loop (Dao 2023) over pages.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_block import attend_block
from kernels.gpu.configs import next_power_of_2, prefill_config
from kernels.ops import AttentionBatch, LayerKv

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["first_sequence", "window"])
def prefill_attention_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_tables,
    context_lens,
    query_starts,
    out,
    first_sequence,
    scale_log2,
    q_stride,
    slot_stride,
    head_stride,
    table_stride,
    num_q_heads,
    num_kv_heads,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program per (tile of tokens, key/value head, sequence); row r is head r % GROUP of token r // GROUP."""
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    sequence = (tl.program_id(2) + first_sequence).to(tl.int64)
    query_start = tl.load(query_starts + sequence)
    num_tokens = tl.load(query_starts + sequence + 1) - query_start
    tile = tl.program_id(0) * TOKENS
    if tile < num_tokens:
        context = tl.load(context_lens + sequence)
        r = tl.arange(0, ROWS)
        d = tl.arange(0, D_PAD)
        token = tile + r // GROUP
        row_ok = (r < TOKENS * GROUP) & (token < num_tokens)
        position = context - num_tokens + token
        heads = kv_head * GROUP + r % GROUP
        rows = (query_start + token).to(tl.int64)
        loaded = row_ok[:, None] & (d < D)[None, :]
        query = tl.load(q + (rows * q_stride + heads * D)[:, None] + d[None, :], mask=loaded, other=0.0)

        last = tl.minimum(tile + TOKENS, num_tokens)
        end = context - num_tokens + last
        first = 0
        if WINDOWED:
            first = tl.maximum(context - num_tokens + tile - window + 1, 0)
            first = (first // BLOCK) * BLOCK
        top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, D_PAD), dtype=tl.float32)
        for start in range(first, end, BLOCK):
            j = start + tl.arange(0, BLOCK)
            ok = j < end
            seen = j[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (j[None, :] > position[:, None] - window)
            top, total, acc = attend_block(
                query,
                k_cache,
                v_cache,
                k_scale,
                v_scale,
                block_tables + sequence * table_stride,
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
                ROWS,
                PAGE,
                D,
                D_PAD,
                BLOCK,
                INT8,
                UPCAST,
            )
        mean = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = out + (rows * num_q_heads + heads)[:, None] * D + d[None, :]
        tl.store(to, mean.to(out.dtype.element_ty), mask=loaded)


def prefill_attention(
    q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None, out: Tensor
) -> None:
    """Sequences from `batch.num_decodes` on: their rows of q [T, HQ, D] into those of out [T, HQ, D] (contiguous)."""
    num_sequences = batch.context_lens.shape[0] - batch.num_decodes
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = kv.key.shape[1]
    group = num_q_heads // num_kv_heads
    tile = prefill_config(group, head_dim, q.dtype)
    tokens_per_tile = tile.block_rows // group
    prefill_attention_kernel[(-(-batch.max_query_len // tokens_per_tile), num_kv_heads, num_sequences)](
        q,
        kv.key,
        kv.value,
        kv.key if kv.key_scale is None else kv.key_scale,
        kv.value if kv.value_scale is None else kv.value_scale,
        batch.block_tables,
        batch.context_lens,
        batch.query_starts,
        out,
        batch.num_decodes,
        scale * _LOG2_E,
        q.stride(0),
        kv.key.stride(0),
        kv.key.stride(1),
        batch.block_tables.stride(0),
        num_q_heads,
        num_kv_heads,
        0 if window is None else window,
        GROUP=group,
        ROWS=tile.block_rows,
        PAGE=batch.block_size,
        D=head_dim,
        D_PAD=max(16, next_power_of_2(head_dim)),
        BLOCK=tile.block_len,
        INT8=kv.key_scale is not None,
        WINDOWED=window is not None,
        UPCAST=q.device.type == "cpu",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
