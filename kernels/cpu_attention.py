"""Paged attention on CPUs: small decode batches in one padded SDPA, everything else one sequence at a time.

Padding pays while the gathered keys stay in the cache: 16 sequences of about 200 tokens, 2 key heads of 32, take 0.7 ms
in one call and 2.1 ms one by one (a Zen 3 core, pages scattered). Beyond that it copies what can be read in place: 16
sequences of about 1,000 tokens, 12 heads of 64, take 122 ms padded, 21 ms one by one, and 12 ms where the pages of each
sequence follow each other, which is why the page allocator hands out neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import AttentionBatch, LayerKv

PADDED_BYTES = 2 << 20  # gathered keys of a padded batch at most: they stay in the second-level cache
PADDED_WASTE = 2.0  # gathered tokens at most, as a multiple of the tokens that count


@dataclass(slots=True)
class _Rows:
    """Where the visible tokens of one sequence are: `length` slots from `start` on, or those of gathered pages."""

    start: int  # first slot where the pages follow each other
    pages: Tensor | None  # int64 page numbers where they do not
    skip: int  # tokens of the first gathered page that are not visible
    length: int


@dataclass(slots=True)
class _Padded:
    """A decode batch of one shape."""

    pages: Tensor  # int64 [S * P]
    mask: Tensor  # float32 [S, 1, 1, P * block_size]: 0 or -inf


@dataclass(slots=True)
class _Plan:
    """What the page tables of a step mean for layers of one window; made by the first such layer."""

    padded: _Padded | None
    rows: list[_Rows]  # empty entries for sequences in the padded batch are not made


def paged_attention(q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
    """Causal attention of q float32 [T, HQ, D] over the cache -> [T, HQ * D]; see Ops.attention."""
    tokens, heads, width = q.shape
    plan: _Plan | None = batch.scratch.get(window)
    if plan is None:
        # a padded batch multiplies what it must not see by 0, so the cache must not be able to hold infinities
        paddable = kv.key.dtype in (torch.float32, torch.bfloat16)
        plan = batch.scratch[window] = _make_plan(batch, window, 4 * kv.key.shape[1] * width, paddable)
    scaled = q * scale
    folded = scaled.view(tokens, kv.key.shape[1], -1, width)  # a group's query heads become rows: [T, HKV, G, D]
    if plan.padded is not None and batch.num_decodes == tokens:
        return _decode_padded(folded, kv, plan.padded, batch.block_size).flatten(1)
    out = torch.empty(folded.shape)
    first = 0
    if plan.padded is not None:
        first = batch.num_decodes
        out[:first] = _decode_padded(folded[:first], kv, plan.padded, batch.block_size)
    for s in range(first, len(batch.context_lens_host)):
        begin, end = batch.query_starts_host[s], batch.query_starts_host[s + 1]
        parts = _read(kv, plan.rows[s - first], batch.block_size)
        if end - begin == 1:
            _decode(folded[begin], *parts, out[begin])
        else:
            result = _prefill(scaled[begin:end], *parts, window)
            out[begin:end].view(result.shape).copy_(result)
    return out.view(tokens, heads * width)


def _make_plan(batch: AttentionBatch, window: int | None, token_bytes: int, paddable: bool) -> _Plan:
    """`token_bytes` of keys in float32."""
    size, decodes = batch.block_size, batch.num_decodes
    tables = batch.block_tables.tolist()
    lengths = batch.context_lens_host[:decodes]
    padded = None
    if decodes > 0 and paddable:
        width = -(-max(lengths) // size)
        gathered = decodes * width * size
        seen = max(lengths) if window is None else min(window, max(lengths))
        if (
            gathered * token_bytes <= PADDED_BYTES
            and gathered <= PADDED_WASTE * sum(lengths)
            and seen * 2 > max(lengths)
        ):
            padded = _pad([table[:width] for table in tables[:decodes]], lengths, size, window)
    first = decodes if padded is not None else 0
    rows = []
    for s in range(first, len(tables)):
        context = batch.context_lens_host[s]
        queries = batch.query_starts_host[s + 1] - batch.query_starts_host[s]
        visible = context if window is None else min(context, queries + window - 1)  # tokens any query sees
        rows.append(_rows(tables[s], size, context - visible, context))
    return _Plan(padded, rows)


def _pad(tables: list[list[int]], lengths: list[int], size: int, window: int | None) -> _Padded:
    positions = torch.arange(len(tables[0]) * size)
    ends = torch.tensor(lengths)[:, None]
    hidden = positions >= ends
    if window is not None:
        hidden |= positions < ends - window
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    return _Padded(torch.tensor(tables).flatten(), mask[:, None, None])


def _rows(pages: list[int], size: int, begin: int, end: int) -> _Rows:
    """Tokens begin..end. A view where the pages follow each other takes half the time of gathering them."""
    used = pages[begin // size : -(-end // size)]
    skip = begin % size
    if used[-1] - used[0] == len(used) - 1 and used == list(range(used[0], used[0] + len(used))):
        return _Rows(used[0] * size + skip, None, 0, end - begin)
    return _Rows(0, torch.tensor(used), skip, end - begin)


def _read(kv: LayerKv, rows: _Rows, size: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values [L, HKV, D] and their scales [L, HKV] of one sequence's visible tokens."""
    keys, values = _take(kv.key, rows, size), _take(kv.value, rows, size)
    if kv.key_scale is None or kv.value_scale is None:
        return keys, values, None, None
    return keys, values, _take(kv.key_scale, rows, size), _take(kv.value_scale, rows, size)


def _take(cache: Tensor, rows: _Rows, size: int) -> Tensor:
    if rows.pages is None:
        return cache[rows.start : rows.start + rows.length]
    paged = cache.view(-1, size, *cache.shape[1:])
    return paged.index_select(0, rows.pages).flatten(0, 1)[rows.skip : rows.skip + rows.length]


def _decode_padded(q: Tensor, kv: LayerKv, padded: _Padded, size: int) -> Tensor:
    """q [S, HKV, G, D] already scaled -> [S, HKV, G, D]."""
    keys, values = (
        cache.view(-1, size, *cache.shape[1:]).index_select(0, padded.pages).float()
        .view(q.shape[0], -1, *cache.shape[1:]).transpose(1, 2)  # [S, HKV, L, D]
        for cache in (kv.key, kv.value)
    )  # fmt: skip
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=padded.mask, scale=1.0)


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
