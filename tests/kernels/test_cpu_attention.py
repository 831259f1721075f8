"""Paged attention on CPUs against the reference in float64: ragged mixed batches, windows, int8 caches, groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuOps
from kernels.cpu_attention import _rows, _take
from kernels.ops import AttentionBatch, LayerKv
from kernels.reference import ReferenceOps

CPU = torch.device("cpu")
OPS = CpuOps(CPU)
REFERENCE = ReferenceOps(CPU, torch.float64)
BLOCK, PAGES = 4, 80


def make_batch(work: list[tuple[int, int]], neighbours: bool) -> AttentionBatch:
    """`work` holds (context, queries) of each sequence; pages are shuffled, or follow each other."""
    blocks = [-(-context // BLOCK) for context, _ in work]
    order = (torch.arange if neighbours else torch.randperm)(PAGES)
    tables = torch.zeros(len(work), max(blocks) + 2, dtype=torch.int32)
    for s, count in enumerate(blocks):
        tables[s, :count] = order[sum(blocks[:s]) : sum(blocks[:s]) + count]
    starts = [0]
    for _, queries in work:
        starts.append(starts[-1] + queries)
    return AttentionBatch(
        slots=torch.zeros(starts[-1], dtype=torch.long),
        block_tables=tables,
        context_lens=torch.tensor([c for c, _ in work], dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens_host=[c for c, _ in work],
        query_starts_host=starts,
        block_size=BLOCK,
        num_decodes=sum(q == 1 for _, q in work),
        max_query_len=max(q for _, q in work),
        max_context_len=max(c for c, _ in work),
    )


def make_cache(
    dtype: torch.dtype, kv_heads: int, size: int, batch: AttentionBatch, unused_value: float = torch.nan
) -> LayerKv:
    """Random where a token lives, NaN (or a NaN scale) elsewhere: nothing may read there.

    A padded batch reads the rest of a page and multiplies it by 0: there it is large, but finite.
    """
    used = torch.zeros(PAGES, BLOCK, dtype=torch.bool)
    for s, context in enumerate(batch.context_lens_host):
        for i in range(context):
            used[batch.block_tables[s, i // BLOCK], i % BLOCK] = True
    unused = ~used.flatten()
    if dtype == torch.int8:
        tensors = [torch.randint(-127, 128, (PAGES * BLOCK, kv_heads, size)).to(dtype) for _ in range(2)]
        scales = [(torch.rand(PAGES * BLOCK, kv_heads) / 60).masked_fill(unused[:, None], torch.nan) for _ in range(2)]
        return LayerKv(*tensors, *scales)
    key, value = (torch.randn(PAGES * BLOCK, kv_heads, size).to(dtype) for _ in range(2))
    return LayerKv(
        key.masked_fill(unused[:, None, None], unused_value), value.masked_fill(unused[:, None, None], unused_value)
    )


def attend(q: Tensor, kv: LayerKv, batch: AttentionBatch, window: int | None) -> tuple[Tensor, Tensor]:
    return (
        OPS.attention(q, kv, batch, 0.3, window).double(),
        REFERENCE.attention(q.double(), kv, batch, 0.3, window),
    )


MIXED = [(9, 1), (33, 1), (1, 1), (30, 30), (17, 5), (64, 64), (23, 2), (12, 12)]
EVEN = [(30, 1), (33, 1), (21, 1), (30, 30), (17, 5)]  # its decodes are padded to one shape
# Scores are sums of 24 products below 30 in float32: off by 24 * 2^-24 * 30 < 5e-5, typically 30 times less; weights
# and outputs (values below 5) are off by as much relatively.
TOLERANCE = 2e-5


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("neighbours", [False, True])
def test_mixed_batch(group: int, window: int | None, neighbours: bool) -> None:
    torch.manual_seed(group)
    batch = make_batch(MIXED, neighbours)
    kv = make_cache(torch.float32, 2, 24, batch)
    q = torch.randn(batch.query_starts_host[-1], 2 * group, 24)
    actual, expected = attend(q, kv, batch, window)
    assert actual.shape == (q.shape[0], 2 * group * 24)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("work", [EVEN, EVEN[:3], [(50, 1)] * 9])
def test_decodes_of_one_shape(work: list[tuple[int, int]], window: int | None, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(group)
    batch = make_batch(work[: 80 // 13], neighbours=False)
    kv = make_cache(dtype, 2, 24, batch, unused_value=1e4)
    q = torch.randn(batch.query_starts_host[-1], 2 * group, 24)
    actual, expected = attend(q, kv, batch, window)
    assert batch.scratch[window].padded is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_large_or_uneven_decode_batches_are_not_padded() -> None:
    for work, size in ((MIXED, 24), ([(64, 1)] * 5, 2048)):
        batch = make_batch(work, neighbours=False)
        OPS.attention(torch.randn(batch.query_starts_host[-1], 2, size), make_cache(torch.float32, 2, size, batch),
                      batch, 0.3, None)  # fmt: skip
        assert batch.scratch[None].padded is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("neighbours", [False, True])
def test_narrow_caches(dtype: torch.dtype, window: int | None, neighbours: bool) -> None:
    torch.manual_seed(0)
    batch = make_batch(MIXED, neighbours)
    kv = make_cache(dtype, 3, 24, batch)
    q = torch.randn(batch.query_starts_host[-1], 6, 24)
    actual, expected = attend(q, kv, batch, window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    batch = make_batch([(20, 1), (20, 20)], neighbours=True)
    kv = make_cache(torch.float32, 1, 16, batch)
    q = torch.randn(21, 1, 16) * 1e4
    actual, expected = attend(q, kv, batch, None)
    # scores near 3e4, off by 16 * 2^-24 * 1e5 at most: weights off by 10% at worst; far from overflow
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("work", [MIXED, EVEN])
def test_a_sequence_does_not_depend_on_the_others(work: list[tuple[int, int]]) -> None:
    """Alone or in company: the same up to float32 rounding, and bit for bit where the decodes are not padded."""
    torch.manual_seed(0)
    batch = make_batch(work, neighbours=False)
    kv = make_cache(torch.float32, 2, 16, batch, unused_value=0.0)
    q = torch.randn(batch.query_starts_host[-1], 4, 16)
    together = OPS.attention(q, kv, batch, 0.25, None)
    for s, (context, queries) in enumerate(work):
        begin, end = batch.query_starts_host[s], batch.query_starts_host[s + 1]
        alone = make_batch([(context, queries)], neighbours=True)
        alone.block_tables = batch.block_tables[s : s + 1]
        found = OPS.attention(q[begin:end], kv, alone, 0.25, None)
        torch.testing.assert_close(found, together[begin:end], rtol=0, atol=2e-6)
        if queries > 1:
            assert torch.equal(found, together[begin:end])


def test_neighbouring_pages_are_read_in_place() -> None:
    cache = torch.arange(40.0).view(20, 2, 1)
    view = _take(cache, _rows([0, 1, 2, 3], 4, 6, 13), 4)
    assert view.data_ptr() == cache[6].data_ptr() and torch.equal(view, cache[6:13])
    for pages in ([3, 2, 1], [1, 3, 2, 4], [1, 1]):
        slots = torch.tensor([p * 4 + i for p in pages for i in range(4)])
        assert torch.equal(_take(cache, _rows(pages, 4, 1, 6), 4), cache[slots][1:6])
