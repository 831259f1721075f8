"""Decode and prefill attention of `TritonOps` against the reference in float64, over every kind of batch and cache."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import as_float64, context_slots, num_slots
from kernels.gpu.configs import SPLIT_LEN
from kernels.ops import AttentionBatch
from kernels.reference import store


def filled_cache(make, batch, num_heads, head_dim, dtype):
    """Every slot of every context holds something; all other slots hold poison."""
    kv = make.cache(num_slots(batch), num_heads, head_dim, dtype)
    for i, context in enumerate(batch.context_lens_host):
        slots = context_slots(batch.block_tables[i], batch.block_size, context)
        k, v = make.normal(context, num_heads, head_dim), make.normal(context, num_heads, head_dim)
        store(k, kv.key, kv.key_scale, slots)
        store(v, kv.value, kv.value_scale, slots)
    return kv


ATTENTION = {  # head size, kv heads, group, page, queries, contexts, window
    "decode": (64, 2, 2, 16, [1, 1, 1], [1, 16, 37], None),
    "decode over three splits": (32, 1, 8, 16, [1, 1], [2 * SPLIT_LEN + 3, 5], None),
    "decode, exactly one split": (32, 1, 1, 16, [1], [SPLIT_LEN], None),
    "decode, window over splits": (80, 1, 3, 16, [1, 1], [SPLIT_LEN + 30, 20], 40),
    "decode, window 1": (32, 2, 1, 16, [1], [70], 1),
    "prefill": (64, 1, 2, 16, [33, 1 + 16], [33, 17], None),
    "prefill of many tiles, no group": (32, 2, 1, 16, [130], [130], None),
    "chunk after context": (80, 1, 3, 16, [25], [90], None),
    "chunk with window": (32, 1, 8, 16, [30], [100], 9),
    "chunks and decodes": (64, 2, 3, 16, [1, 1, 7, 20], [40, 3, 50, 20], None),
    "pages of 5": (16, 1, 1, 5, [1, 12], [33, 12], None),
}


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention(ops, exact, make, close, case, kind):
    head_dim, kv_heads, group, page, queries, contexts, window = case
    batch = make.batch(queries, contexts, page)
    kv = filled_cache(make, batch, kv_heads, head_dim, torch.int8 if kind == "int8" else ops.dtype)
    q = make.normal(sum(queries), kv_heads * group, head_dim, dtype=ops.dtype)
    got = ops.attention(q, kv, batch, head_dim**-0.5, window)
    want = exact.attention(q.double(), as_float64(kv), batch, head_dim**-0.5, window)
    close(ops, got, want, 2, head_dim + max(contexts))
    assert torch.count_nonzero(ops.gpu.counters) == 0  # ready for the next launch


def test_int8_values_of_very_different_scales(ops, exact, make, close):
    # Scales down to 1e-9 times the largest: a product probability * scale in fp16 would vanish.
    batch = make.batch([1], [50])
    kv = filled_cache(make, batch, 1, 32, torch.int8)
    kv.value_scale.mul_(1e-6)
    q = make.normal(1, 1, 32, dtype=ops.dtype)
    wide = TritonOps(ops.device, torch.float32)
    got = wide.attention(q.float(), kv, batch, 32**-0.5, None)
    same = ops.attention(q, kv, batch, 32**-0.5, None)
    want = exact.attention(q.double(), as_float64(kv), batch, 32**-0.5, None)
    close(wide, got, want, 2, 82)
    # The result itself is below fp16's smallest normal number, 2^-14: its spacing 2^-24 bounds the error.
    assert (same.double() - want).abs().max() <= max(2.0**-24, float(want.abs().max()) * 2**-10)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(ops, make):
    batch = make.batch([1, 1], [37, 2 * SPLIT_LEN])
    kv = filled_cache(make, batch, 1, 32, ops.dtype)
    q = make.normal(2, 2, 32, dtype=ops.dtype)
    together = ops.attention(q, kv, batch, 1.0, None)
    alone = AttentionBatch(
        batch.slots[:1], batch.block_tables[:1], batch.context_lens[:1], batch.query_starts[:2], [37], [0, 1],
        batch.block_size, 1, 1, 37,
    )  # fmt: skip
    assert torch.equal(ops.attention(q[:1], kv, alone, 1.0, None), together[:1])


@pytest.mark.parametrize("longest", [1, SPLIT_LEN + 1])
def test_an_empty_sequence_that_pads_a_batch_gives_zeros(ops, make, longest):
    batch = make.batch([1, 1], [longest, 1])
    batch.context_lens.zero_()
    kv = make.cache(num_slots(batch), 1, 32, ops.dtype)
    out = ops.attention(make.normal(2, 2, 32, dtype=ops.dtype), kv, batch, 1.0, None)
    assert torch.count_nonzero(out) == 0 and not out.isnan().any()


def test_attention_in_bf16(exact, make, close, device):
    ops = TritonOps(device, torch.bfloat16)
    batch = make.batch([1, 9], [30, 20])
    for dtype in (torch.int8, torch.bfloat16):
        kv = filled_cache(make, batch, 1, 32, dtype)
        q = make.normal(10, 2, 32, dtype=torch.bfloat16)
        want = exact.attention(q.double(), as_float64(kv), batch, 32**-0.5, None)
        close(ops, ops.attention(q, kv, batch, 32**-0.5, None), want, 2, 62)


def test_heads_that_do_not_divide_are_refused(ops, make):
    batch = make.batch([1], [1])
    with pytest.raises(ValueError, match="evenly"):
        ops.attention(make.normal(1, 3, 16, dtype=ops.dtype), make.cache(32, 2, 16, ops.dtype), batch, 1.0, None)
