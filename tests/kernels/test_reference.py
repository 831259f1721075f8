"""The reference operations against formulas that are not ours: transformers' modules and torch's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels.ops import AttentionBatch, LayerKv
from kernels.reference import ReferenceOps, causal_mask, sequence_slots, store
from kernels.weights import DenseWeight, Int8Weight, LowRankWeight, dequantized

OPS = ReferenceOps(torch.device("cpu"), torch.float64)
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_int8(rows: int, columns: int) -> Int8Weight:
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return Int8Weight(q, torch.rand(rows) + 0.1, torch.randn(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(96, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(dtype)
    x = torch.randn(7, 96).to(dtype) * 30
    torch.testing.assert_close(OPS.rms_norm(x, norm.weight, 1e-5), norm(x), rtol=0, atol=0)


def test_rotary_is_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_theta=10000.0)
    positions = torch.tensor([0, 1, 17, 900])
    q, k, v = torch.randn(4, 4, 16), torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])  # [1, T, D]
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    kv = LayerKv(torch.zeros(9, 2, 16), torch.zeros(9, 2, 16))
    slots = torch.tensor([8, 0, 3, 5])
    rotated = OPS.rotary_store(q, k, v, cos[0, :, :8], sin[0, :, :8], kv, slots)
    # one product and one sum in float32, in either order: 3 roundings of values below 8
    torch.testing.assert_close(rotated, expected_q[0].transpose(0, 1), rtol=0, atol=3e-6)
    torch.testing.assert_close(kv.key[slots], expected_k[0].transpose(0, 1), rtol=0, atol=3e-6)
    assert torch.equal(kv.value[slots], v)
    assert kv.key[[1, 2, 4, 6, 7]].count_nonzero() == 0


def test_int8_store_rounds_to_half_a_step() -> None:
    x = torch.randn(5, 3, 16) * torch.tensor([1e-6, 1.0, 1e4])[:, None]
    cache, scale = torch.zeros(8, 3, 16, dtype=torch.int8), torch.zeros(8, 3)
    slots = torch.tensor([7, 1, 2, 0, 5])
    store(x, cache, scale, slots)
    step = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(scale[slots][..., None], step)
    assert ((cache[slots].float() * scale[slots][..., None] - x).abs() <= step * 0.5001).all()


def test_int8_store_of_zeros_is_finite() -> None:
    cache, scale = torch.ones(2, 1, 4, dtype=torch.int8), torch.full((2, 1), torch.nan)
    store(torch.zeros(1, 1, 4), cache, scale, torch.tensor([1]))
    assert cache[1].count_nonzero() == 0 and scale[1].isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "int8", "low rank", "low rank int8"])
def test_linear_is_the_dequantized_matrix(kind: str) -> None:
    weight = {
        "dense": DenseWeight(torch.randn(9, 20), torch.randn(9)),
        "int8": random_int8(9, 20),
        "low rank": LowRankWeight(DenseWeight(torch.randn(3, 20)), DenseWeight(torch.randn(9, 3), torch.randn(9))),
        "low rank int8": LowRankWeight(Int8Weight(random_int8(3, 20).qweight, torch.rand(3)), random_int8(9, 3)),
    }[kind]
    x = torch.randn(4, 20).double()
    exact = dequantized(weight)
    assert exact.bias is not None
    y = OPS.linear(x, OPS.prepare_linear(weight))
    # `dequantized` is float32: 20 products of numbers below 1300
    torch.testing.assert_close(y, F.linear(x, exact.weight.double(), exact.bias.double()), rtol=1e-5, atol=1e-2)


def test_gate_up_is_transformers() -> None:
    config = LlamaConfig(hidden_size=12, intermediate_size=30, num_attention_heads=2, mlp_bias=False)
    mlp = LlamaMLP(config).double()
    x = torch.randn(5, 12).double()
    gate_up = OPS.prepare_gate_up(DenseWeight(mlp.gate_proj.weight.data), DenseWeight(mlp.up_proj.weight.data))
    down = OPS.prepare_linear(DenseWeight(mlp.down_proj.weight.data))
    torch.testing.assert_close(OPS.linear(OPS.gate_up_silu(x, gate_up), down), mlp(x), **EXACT)


def test_qkv_and_gate_up_refuse_different_inputs() -> None:
    a, b = DenseWeight(torch.randn(4, 8)), DenseWeight(torch.randn(4, 9))
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        OPS.prepare_qkv(a, a, b)
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        OPS.prepare_gate_up(a, b)


def test_embedding_and_tied_logits() -> None:
    table = random_int8(11, 6)
    table.bias = None
    prepared = OPS.prepare_embedding(table, tied_head=True)
    rows = OPS.embed(torch.tensor([3, 3, 10]), prepared)
    full = table.qweight.double() * table.scale.double()[:, None]
    torch.testing.assert_close(rows, full[[3, 3, 10]], **EXACT)
    assert OPS.logits(rows, prepared).dtype == torch.float32
    torch.testing.assert_close(OPS.logits(rows, prepared), (rows @ full.t()).float())


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_attention_is_sdpa_on_contiguous_keys(group: int, window: int | None) -> None:
    kv_heads, size, block = 2, 8, 4
    contexts, queries = [5, 1, 13, 10], [1, 1, 13, 3]
    order = torch.randperm(4 * 4).view(4, 4).int()  # pages of each sequence, shuffled
    key, value = (torch.randn(64, kv_heads, size).double() for _ in range(2))
    starts = [0, 1, 2, 15, 18]
    batch = AttentionBatch(
        slots=torch.zeros(18, dtype=torch.long),
        block_tables=order,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens_host=contexts,
        query_starts_host=starts,
        block_size=block,
        num_decodes=2,
        max_query_len=13,
        max_context_len=13,
    )
    q = torch.randn(18, kv_heads * group, size).double()
    out = OPS.attention(q, LayerKv(key, value), batch, 0.3, window)
    for s, (context, count) in enumerate(zip(contexts, queries, strict=True)):
        slots = [int(order[s, i // block]) * block + i % block for i in range(context)]
        assert sequence_slots(batch, s, context).tolist() == slots
        mask = torch.zeros(count, context, dtype=torch.bool)
        for i in range(count):
            at = context - count + i
            mask[i, 0 if window is None else max(0, at - window + 1) : at + 1] = True
        assert torch.equal(mask, causal_mask(count, context, window, q.device))
        part = q[starts[s] : starts[s + 1]].transpose(0, 1)[None]
        keys, values = (t[slots].transpose(0, 1)[None] for t in (key, value))
        expected = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[starts[s] : starts[s + 1]], expected[0].transpose(0, 1).flatten(1), **EXACT)
