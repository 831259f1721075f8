"""`TritonOps` against the reference in float64 at odd sizes: in Triton's interpreter, or on a GPU where there is one.

Bounds come from `check_correctness.error_limit`: one rounding unit per rounding to the dtype of activations, plus
the float32 sum.
"""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import EPS, error_limit, relative_error
from kernels.gpu.check_data import Maker, as_float64, context_slots, num_slots
from kernels.gpu.configs import PAD, SPLIT_LEN
from kernels.ops import AttentionBatch, LayerKv
from kernels.reference import ReferenceOps
from kernels.weights import DenseWeight, Int8Weight, LowRankWeight

DTYPES = [torch.float32, torch.float16]
INT8_COPIES_EXACT = 0.0


@pytest.fixture(params=DTYPES, ids=["fp32", "fp16"])
def ops(request, device):
    return TritonOps(device, request.param)


@pytest.fixture
def exact(device):
    return ReferenceOps(device, torch.float64)


@pytest.fixture
def make(device):
    return Maker(device)


def close(ops, got, want, roundings, terms):
    error, limit = relative_error(got, want), error_limit(ops.dtype, ops.device, roundings, terms)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize(("out", "inner"), [(130, 200), (1, 1), (96, 128)])
def test_linear_int8(ops, exact, make, rows, out, inner):
    weight = make.int8(out, inner, bias=rows != 3)
    x = make.normal(rows, inner, dtype=ops.dtype)
    got = ops.linear(x, ops.prepare_linear(weight))
    assert got.dtype == ops.dtype and got.is_contiguous()
    close(ops, got, exact.linear(x.double(), weight), 1, inner)


def test_linear_takes_every_int8_value(ops, exact, device):
    weight = Int8Weight(
        torch.arange(-128, 128, device=device).to(torch.int8).view(256, 1), torch.ones(256, device=device)
    )
    got = ops.linear(torch.ones(1, 1, dtype=ops.dtype, device=device), ops.prepare_linear(weight))
    assert got[0].tolist() == list(range(-128, 128))


@pytest.mark.parametrize("rank", [1, 40, 129])
def test_linear_low_rank(ops, exact, make, rank):
    weight = make.low_rank(70, 200, rank, bias=True)
    x = make.normal(5, 200, dtype=ops.dtype)
    close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 2, 200)


def test_linear_float_and_mixed_pairs(ops, exact, make):
    down, up = make.int8(20, 50), make.int8(30, 20)
    dense_down, dense_up = make.dense(20, 50, ops.dtype), make.dense(30, 20, ops.dtype, bias=True)
    x = make.normal(3, 50, dtype=ops.dtype)
    pairs = [LowRankWeight(a, b) for a in (down, dense_down) for b in (up, dense_up)]
    for weight in [*pairs, make.dense(30, 50, ops.dtype, bias=True)]:
        close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 2, 50)


@pytest.mark.parametrize("kinds", ["iii", "lll", "ilr", "ldi", "ddd", "rdl"])
@pytest.mark.parametrize("rows", [1, 18])
def test_qkv_in_every_mix(ops, exact, make, kinds, rows):
    choices = {
        "i": lambda n: make.int8(n, 72, bias=True),
        "l": lambda n: make.low_rank(n, 72, 1),
        "r": lambda n: make.low_rank(n, 72, 130, bias=True),
        "d": lambda n: make.dense(n, 72, ops.dtype),
    }
    weights = [choices[kind](n) for kind, n in zip(kinds, (96, 33, 34), strict=True)]
    x = make.normal(rows, 72, dtype=ops.dtype)
    for got, want in zip(ops.qkv(x, ops.prepare_qkv(*weights)), exact.qkv(x.double(), weights), strict=True):
        assert got.is_contiguous()
        close(ops, got, want, 2, 130)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_feeds_its_padded_width_down_without_a_copy(ops, exact, make, rows, bias):
    width = 40
    gate, up, down = make.int8(width, 200, bias), make.int8(width, 200), make.int8(200, width)
    x = make.normal(rows, 200, dtype=ops.dtype)
    hidden = ops.gate_up_silu(x, ops.prepare_gate_up(gate, up))
    assert hidden.shape == (rows, width) and hidden.stride(0) == PAD
    padding = hidden.as_strided((rows, PAD - width), (PAD, 1), hidden.storage_offset() + width)
    assert torch.count_nonzero(padding) == 0
    close(ops, hidden, exact.gate_up_silu(x.double(), (gate, up)), 1, 4 * 200)
    prepared = ops.prepare_linear(down)
    close(ops, ops.linear(hidden, prepared), exact.linear(hidden.double(), down), 1, width)
    assert torch.equal(ops.linear(hidden, prepared), ops.linear(hidden.contiguous(), prepared))


def test_mlp_of_float_and_low_rank_projections(ops, exact, make):
    x = make.normal(3, 50, dtype=ops.dtype)
    for pair in (
        (make.dense(30, 50, ops.dtype), make.dense(30, 50, ops.dtype)),
        (make.low_rank(30, 50, 7), make.int8(30, 50)),
    ):
        got = ops.gate_up_silu(x, ops.prepare_gate_up(*pair))
        close(ops, got, exact.gate_up_silu(x.double(), pair), 6, 4 * 50)


@pytest.mark.parametrize("table", ["int8", "dense"])
def test_embedding_and_tied_head(ops, exact, make, device, table):
    weight = make.int8(131, 72) if table == "int8" else make.dense(131, 72, ops.dtype)
    prepared = ops.prepare_embedding(weight, tied_head=True)
    ids = torch.tensor([0, 130, 7, 7], device=device)
    close(ops, ops.embed(ids, prepared), exact.embed(ids, weight), 1, 1)
    x = make.normal(2, 72, dtype=ops.dtype)
    got = ops.logits(x, prepared)
    assert got.dtype == torch.float32
    close(ops, got, exact.linear(x.double(), weight), 0 if table == "int8" else 1, 72)


@pytest.mark.parametrize("shape", [(3, 72), (2, 3, 80), (1, 1025)])
def test_norms(ops, exact, make, shape):
    x, residual = make.normal(*shape, dtype=ops.dtype), make.normal(*shape, dtype=ops.dtype)
    weight = make.normal(shape[-1], dtype=ops.dtype)
    close(ops, ops.rms_norm(x, weight, EPS), exact.rms_norm(x.double(), weight.double(), EPS), 1, shape[-1])
    want, total = exact.add_rms_norm(x.double(), residual.double(), weight.double(), EPS)
    got, got_total = ops.add_rms_norm(x, residual, weight, EPS)
    close(ops, got, want, 2, shape[-1])
    close(ops, got_total, total, 1, 1)


def test_norm_of_a_column_slice(ops, exact, make):
    x, weight = make.normal(3, 80, dtype=ops.dtype)[:, 8:40], make.normal(32, dtype=ops.dtype)
    close(ops, ops.rms_norm(x, weight, EPS), exact.rms_norm(x.double(), weight.double(), EPS), 1, 32)


@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_rotary_store_float_cache(ops, exact, make, head_dim):
    q, k, v, cos, sin, slots = rotary_inputs(ops, make, head_dim)
    kv, want_kv = (make.cache(9, 2, head_dim, dtype) for dtype in (ops.dtype, torch.float64))
    got = ops.rotary_store(q, k, v, cos, sin, kv, slots)
    want = exact.rotary_store(q.double(), k.double(), v.double(), cos.double(), sin.double(), want_kv, slots)
    close(ops, got, want, 1, 2)
    close(ops, kv.key[slots], want_kv.key[slots], 1, 2)
    assert torch.equal(kv.value[slots], v)
    untouched = [s for s in range(9) if s not in slots.tolist()]
    assert kv.key[untouched].isnan().all() and kv.value[untouched].isnan().all()


def test_rotary_store_int8_cache(ops, exact, make):
    q, k, v, cos, sin, slots = rotary_inputs(ops, make, 80)
    v[1, 0] = 0
    kv, want = make.cache(9, 2, 80, torch.int8), make.cache(9, 2, 80, torch.int8)
    ops.rotary_store(q, k, v, cos, sin, kv, slots)
    exact.rotary_store(q.double(), k.double(), v.double(), cos.double(), sin.double(), want, slots)
    assert (kv.key - want.key).abs().max() <= 1  # a tie may round either way after float32 rotation
    assert relative_error(kv.value.double(), want.value.double()) == INT8_COPIES_EXACT
    assert relative_error(kv.value_scale[slots], want.value_scale[slots]) <= torch.finfo(torch.float32).eps
    assert torch.equal(kv.key_scale.isnan(), want.key_scale.isnan())


def rotary_inputs(ops, make, head_dim):
    cos, sin = make.angles(3, head_dim)
    slots = torch.tensor([8, 0, 5], device=ops.device)
    # Sliced out of one projection: tokens are further apart than their heads are wide.
    qkv = make.normal(3, 4 + 2 + 2, head_dim, dtype=ops.dtype)
    return qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], cos, sin, slots


def filled_cache(exact, make, batch, num_heads, head_dim, dtype):
    """Every slot of every context holds something; all other slots hold poison."""
    kv = make.cache(num_slots(batch), num_heads, head_dim, dtype)
    for i, context in enumerate(batch.context_lens_host):
        slots = context_slots(batch.block_tables[i], batch.block_size, context)
        k, v = make.normal(context, num_heads, head_dim), make.normal(context, num_heads, head_dim)
        cos, sin = make.angles(context, head_dim)
        exact.rotary_store(k, k, v, cos, sin, kv, slots)
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
def test_attention(ops, exact, make, case, kind):
    head_dim, kv_heads, group, page, queries, contexts, window = case
    batch = make.batch(queries, contexts, page)
    kv = filled_cache(exact, make, batch, kv_heads, head_dim, torch.int8 if kind == "int8" else ops.dtype)
    q = make.normal(sum(queries), kv_heads * group, head_dim, dtype=ops.dtype)
    got = ops.attention(q, kv, batch, head_dim**-0.5, window)
    want = exact.attention(q.double(), as_float64(kv), batch, head_dim**-0.5, window)
    close(ops, got, want, 2, head_dim + max(contexts))


def test_int8_values_of_very_different_scales(ops, exact, make):
    # Scales down to 1e-9 times the largest: a product probability * scale in fp16 would vanish.
    batch = make.batch([1], [50])
    kv = filled_cache(exact, make, batch, 1, 32, torch.int8)
    kv.value_scale.mul_(1e-6)
    q = make.normal(1, 1, 32, dtype=ops.dtype)
    wide = TritonOps(ops.device, torch.float32)
    got = wide.attention(q.float(), kv, batch, 32**-0.5, None)
    same = ops.attention(q, kv, batch, 32**-0.5, None)
    want = exact.attention(q.double(), as_float64(kv), batch, 32**-0.5, None)
    close(wide, got, want, 2, 82)
    # The result itself is below fp16's smallest normal number, 2^-14: its spacing 2^-24 bounds the error.
    assert (same.double() - want).abs().max() <= max(2.0**-24, float(want.abs().max()) * 2**-10)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(ops, exact, make):
    batch = make.batch([1, 1], [37, 2 * SPLIT_LEN])
    kv = filled_cache(exact, make, batch, 1, 32, ops.dtype)
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


def test_bf16_in_the_same_kernels(exact, make, device):
    ops = TritonOps(device, torch.bfloat16)
    weight, x = make.low_rank(40, 72, 3), make.normal(3, 72, dtype=torch.bfloat16)
    close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 2, 72)
    batch = make.batch([1, 9], [30, 20])
    for dtype in (torch.int8, torch.bfloat16):
        kv = filled_cache(exact, make, batch, 1, 32, dtype)
        q = make.normal(10, 2, 32, dtype=torch.bfloat16)
        want = exact.attention(q.double(), as_float64(kv), batch, 32**-0.5, None)
        close(ops, ops.attention(q, kv, batch, 32**-0.5, None), want, 2, 62)


def test_nbytes_counts_padding(ops, make):
    size = torch.finfo(ops.dtype).bits // 8
    assert ops.nbytes(ops.prepare_linear(make.int8(10, 100, bias=True))) == 10 * PAD + 2 * 10 * 4
    assert ops.nbytes(ops.prepare_linear(make.low_rank(10, 100, 3))) == PAD * PAD + PAD * 4 + 10 * PAD + 10 * 4
    assert ops.nbytes(ops.prepare_gate_up(make.int8(10, 100), make.int8(10, 100))) == 2 * PAD * (PAD + 4)
    dense = make.dense(10, 100, torch.float32)
    assert ops.nbytes(ops.prepare_qkv(make.int8(10, 100), dense, dense)) == 10 * (PAD + 4) + 2 * 10 * 100 * size


def test_no_tokens(ops, make):
    x = make.normal(0, 72, dtype=ops.dtype)
    assert ops.linear(x, ops.prepare_linear(make.int8(10, 72))).shape == (0, 10)
    q, k, v = ops.qkv(x, ops.prepare_qkv(make.low_rank(8, 72, 2), make.int8(4, 72), make.int8(6, 72)))
    assert (q.shape, k.shape, v.shape) == ((0, 8), (0, 4), (0, 6))
    assert ops.gate_up_silu(x, ops.prepare_gate_up(make.int8(9, 72), make.int8(9, 72))).shape == (0, 9)
    assert ops.rms_norm(x, make.normal(72, dtype=ops.dtype), EPS).shape == (0, 72)


def test_disagreeing_shapes_are_refused(ops, make):
    a, b = make.int8(10, 72), make.int8(10, 73)
    with pytest.raises(ValueError, match="input width"):
        ops.prepare_qkv(a, a, b)
    with pytest.raises(ValueError, match="input width"):
        ops.prepare_gate_up(a, b)
    with pytest.raises(ValueError, match="width"):
        ops.prepare_gate_up(a, make.int8(11, 72))
    with pytest.raises(ValueError, match="scale"):
        ops.prepare_linear(Int8Weight(a.qweight, a.scale[:9]))
    with pytest.raises(ValueError, match="bias"):
        ops.prepare_linear(DenseWeight(a.qweight.float(), a.scale[:9]))
    for up in (make.int8(5, 9), make.dense(5, 9, ops.dtype)):
        with pytest.raises(ValueError, match=r"pair|rank"):
            ops.prepare_linear(LowRankWeight(a, up))
    with pytest.raises(ValueError, match="dense rows"):
        ops.linear(make.normal(3, 71, dtype=ops.dtype), ops.prepare_linear(a))
    with pytest.raises(ValueError, match="evenly"):
        batch = make.batch([1], [1])
        ops.attention(make.normal(1, 3, 16, dtype=ops.dtype), make.cache(32, 2, 16, ops.dtype), batch, 1.0, None)
    with pytest.raises(ValueError, match="laid out alike"):
        kv = LayerKv(make.cache(9, 2, 16, ops.dtype).key, make.cache(9, 4, 16, ops.dtype).value)
        x, (cos, sin) = make.normal(1, 2, 16, dtype=ops.dtype), make.angles(1, 16)
        ops.rotary_store(x, x, x, cos, sin, kv, torch.zeros(1, dtype=torch.int64, device=ops.device))


def test_wrong_device_or_dtype_is_refused(device):
    with pytest.raises(ValueError, match="float64"):
        TritonOps(device, torch.float64)
    with pytest.raises(RuntimeError, match="meta"):
        TritonOps(torch.device("meta"), torch.float16)
