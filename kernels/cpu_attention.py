"""Paged attention on CPUs, one sequence at a time: decoding as two small matrix products, prompts through SDPA.

Not a padded batch. Gathering every sequence to one length copies what can often be read in place: 16 sequences of
130 tokens, 12 heads of 64, on a Zen 3 core took 17 ms padded, 6.9 ms one by one, and 2.8 ms where the pages of each
sequence follow each other (an allocator that hands out neighbouring pages pays here). It also keeps a sequence's
result independent of the others in the step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import AttentionBatch, LayerKv


def paged_attention(q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
    """Causal attention of q float32 [T, HQ, D] over the cache -> [T, HQ * D]; see Ops.attention."""
    tokens, heads, width = q.shape
    scaled = q * scale
    folded = scaled.view(tokens, kv.key.shape[1], -1, width)  # a group's query heads become rows: [T, HKV, G, D]
    out = torch.empty(folded.shape)
    size = batch.block_size
    pages = batch.block_tables[:, : -(-batch.max_context_len // size)].tolist()
    for s, context in enumerate(batch.context_lens_host):
        begin, end = batch.query_starts_host[s], batch.query_starts_host[s + 1]
        queries = end - begin
        visible = context if window is None else min(context, queries + window - 1)  # tokens any query sees
        parts = _read(kv, pages[s], size, context - visible, context)
        if queries == 1:
            _decode(folded[begin], *parts, out[begin])
        else:
            result = _prefill(scaled[begin:end], *parts, window)
            out[begin:end].view(result.shape).copy_(result)
    return out.view(tokens, heads * width)


def _read(
    kv: LayerKv, pages: list[int], size: int, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens begin..end of a sequence: keys, values [L, HKV, D] and their scales [L, HKV]."""
    base = begin // size * size
    used = pages[begin // size : -(-end // size)]
    keys = _rows(kv.key, used, size, begin - base, end - base)
    values = _rows(kv.value, used, size, begin - base, end - base)
    if kv.key_scale is None or kv.value_scale is None:
        return keys, values, None, None
    key_scale = _rows(kv.key_scale, used, size, begin - base, end - base)
    return keys, values, key_scale, _rows(kv.value_scale, used, size, begin - base, end - base)


def _rows(cache: Tensor, pages: list[int], size: int, begin: int, end: int) -> Tensor:
    """Rows begin..end of the given pages of a cache [num_slots, ...]: [end - begin, ...].

    A view where the pages follow each other (half the time of gathering: 1.2 against 2.2 ms for 12 heads of 64 and
    2,048 tokens on a Zen 3 core), else whole pages are copied.
    """
    start, count = pages[0], len(pages)
    if pages[-1] - start == count - 1 and pages == list(range(start, start + count)):
        return cache[start * size + begin : start * size + end]
    paged = cache.view(-1, size, *cache.shape[1:])
    return paged.index_select(0, torch.tensor(pages)).flatten(0, 1)[begin:end]


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, out: Tensor
) -> None:
    """q [HKV, G, D] already scaled, keys/values [L, HKV, D] -> out [HKV, G, D].

    Scales [L, HKV] of an int8 cache weigh scores and probabilities instead of every key and value. bfloat16 is
    widened first: without AVX512 its products take three times as long and more.
    """
    scores = torch.bmm(q, keys.float().permute(1, 2, 0))  # [HKV, G, L]
    if key_scale is not None:
        scores.mul_(key_scale.t()[:, None])
    probs = torch.softmax(scores, -1)
    if value_scale is not None:
        probs.mul_(value_scale.t()[:, None])
    torch.bmm(probs, values.float().transpose(0, 1), out=out)


def _prefill(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, window: int | None
) -> Tensor:
    """q [N, HQ, D] already scaled, the last N of the keys' tokens; keys/values [L, HKV, D] -> [N, HQ, D]."""
    keys, values = keys.float(), values.float()
    if key_scale is not None and value_scale is not None:
        keys, values = keys * key_scale[..., None], values * value_scale[..., None]
    queries, length = q.shape[0], keys.shape[0]
    whole = queries == length and (window is None or length <= window)
    mask = None if whole else _mask(queries, length, window)
    q, keys, values = (t.transpose(0, 1)[None] for t in (q, keys, values))  # [1, H, tokens, D]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=whole, scale=1.0, enable_gqa=True)
    return y[0].transpose(0, 1)


def _mask(queries: int, length: int, window: int | None) -> Tensor:
    """bool [queries, length]: True where a query, one of the last of `length` tokens, may look."""
    visible = torch.ones(queries, length, dtype=torch.bool).tril_(length - queries)
    return visible if window is None else visible.triu_(length - queries - window + 1)
