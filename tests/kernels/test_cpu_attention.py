"""Paged attention on CPUs against the reference in float64: ragged mixed batches, windows, int8 caches, groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuOps
from kernels.cpu_attention import _rows
from kernels.ops import AttentionBatch, LayerKv
from kernels.reference import ReferenceOps

CPU = torch.device("cpu")
OPS = CpuOps(CPU)
REFERENCE = ReferenceOps(CPU, torch.float64)
BLOCK, PAGES = 4, 80


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small products on a busy machine: barriers between threads would cost more than the products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def make_cache(dtype: torch.dtype, kv_heads: int, size: int, batch: AttentionBatch) -> LayerKv:
    """Random where a token lives, NaN (or a NaN scale) elsewhere: nothing may read there."""
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
        key.masked_fill(unused[:, None, None], torch.nan), value.masked_fill(unused[:, None, None], torch.nan)
    )


def attend(q: Tensor, kv: LayerKv, batch: AttentionBatch, window: int | None) -> tuple[Tensor, Tensor]:
    return (
        OPS.attention(q, kv, batch, 0.3, window).double(),
        REFERENCE.attention(q.double(), kv, batch, 0.3, window),
    )


MIXED = [(9, 1), (33, 1), (1, 1), (30, 30), (17, 5), (64, 64), (23, 2), (12, 12)]
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


def test_a_sequence_does_not_depend_on_the_others() -> None:
    """Bit for bit: in the step alone or with seven others."""
    torch.manual_seed(0)
    batch = make_batch(MIXED, neighbours=False)
    kv = make_cache(torch.float32, 2, 16, batch)
    q = torch.randn(batch.query_starts_host[-1], 4, 16)
    together = OPS.attention(q, kv, batch, 0.25, None)
    for s, (context, queries) in enumerate(MIXED):
        begin, end = batch.query_starts_host[s], batch.query_starts_host[s + 1]
        alone = make_batch([(context, queries)], neighbours=True)
        alone.block_tables = batch.block_tables[s : s + 1]
        assert torch.equal(OPS.attention(q[begin:end], kv, alone, 0.25, None), together[begin:end])


def test_neighbouring_pages_are_read_in_place() -> None:
    cache = torch.arange(40.0).view(20, 2, 1)
    view = _rows(cache, [1, 2, 3], 4, 2, 9)
    assert view.data_ptr() == cache[6].data_ptr() and torch.equal(view, cache[6:13])
    for pages in ([3, 2, 1], [1, 3, 2, 4], [1, 1]):
        slots = torch.tensor([p * 4 + i for p in pages for i in range(4)])
        assert torch.equal(_rows(cache, pages, 4, 1, 6), cache[slots][1:6])
