"""From the residual stream to rotated queries and the cache: every mix of projections, head norms and caches."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import relative_error
from kernels.gpu.check_data import as_float64
from kernels.gpu.configs import DECODE_ROWS, TileConfig, int4_block_k
from kernels.gpu.head_linear import head_linear
from kernels.ops import HeadTransform, LayerKv
from kernels.weights import LowRankWeight

HIDDEN = 200
MANY = DECODE_ROWS + 6
ROUNDINGS = 3  # of x times the norm's weight (or of the norm), between two factors, of the result


def int8_limit(head_dim):
    """See check_correctness: a step is absmax / 127, absmax at most sqrt(D) times the root mean square of a head."""
    return head_dim**0.5 / (127 * 12**0.5)


def projections(ops, make, kinds, num_q, num_kv, head_dim):
    choices = {
        "i": lambda n: make.int8(n, HIDDEN, bias=True),
        "l": lambda n: make.low_rank(n, HIDDEN, 1),
        "r": lambda n: make.low_rank(n, HIDDEN, 130, bias=True),
        "d": lambda n: make.dense(n, HIDDEN, ops.dtype),
        "4": lambda n: make.int4(n, HIDDEN, 64, n != head_dim, bias=True),
        "3": lambda n: make.int4(n, HIDDEN, 32),
        "p": lambda n: LowRankWeight(make.int4(130, HIDDEN, 64), make.int4(n, 130, 64, False, bias=True)),
        "s": lambda n: LowRankWeight(make.int4(20, HIDDEN, 64), make.int4(n, 20, 16)),
        "u": lambda n: LowRankWeight(make.int8(40, HIDDEN), make.int4(n, 40)),
    }
    return [choices[kind](n * head_dim) for kind, n in zip(kinds, (num_q, num_kv, num_kv), strict=True)]


def inputs(ops, make, rows, num_kv, head_dim, norms, cache):
    h, norm = 3 * make.normal(rows, HIDDEN, dtype=ops.dtype), make.norm(HIDDEN, ops.dtype)
    heads = make.heads(rows, head_dim, ops.dtype, norms)
    slots = torch.randperm(rows + 3, device=ops.device)[:rows]
    kv, exact_kv = (make.cache(rows + 3, num_kv, head_dim, dtype) for dtype in (cache, torch.float64))
    return h, norm, heads, slots, kv, exact_kv


@pytest.mark.parametrize(
    ("kinds", "rows", "head_dim", "norms", "int8"),
    [
        ("iii", 1, 32, False, True),
        ("iii", 5, 80, True, False),
        ("iii", MANY, 32, True, True),
        ("lrr", 1, 32, False, False),
        ("rrr", 18, 32, True, True),
        ("rlr", MANY, 16, False, False),
        ("rii", 3, 80, False, True),
        ("iri", 3, 32, True, False),
        ("ill", MANY, 32, False, True),
        ("ldi", 3, 32, True, True),
        ("ddd", 2, 32, False, False),
        ("444", 1, 32, False, True),
        ("343", 5, 80, True, False),
        ("434", MANY, 32, True, True),
        ("psp", 1, 32, False, False),
        ("4ps", 18, 32, True, True),
        ("p34", MANY, 16, False, False),
        ("uuu", 3, 32, True, False),
        ("4ip", 3, 32, False, False),
    ],
)
def test_attention_input(ops, exact, make, close, kinds, rows, head_dim, norms, int8):
    weights = projections(ops, make, kinds, 3, 1, head_dim)
    cache = torch.int8 if int8 else ops.dtype
    h, norm, heads, slots, kv, exact_kv = inputs(ops, make, rows, 1, head_dim, norms, cache)
    before = h.clone()
    got = ops.attention_input(h, norm, ops.prepare_qkv(*weights), heads, kv, slots)
    want = exact.attention_input(h.double(), norm, weights, heads, exact_kv, slots)
    assert torch.equal(h, before)
    assert got.shape == (rows, 3, head_dim) and got.is_contiguous()
    close(ops, got, want, ROUNDINGS, HIDDEN)
    stored = as_float64(kv)
    untouched = [s for s in range(rows + 3) if s not in slots.tolist()]
    for mine, ideal in ((stored.key, exact_kv.key), (stored.value, exact_kv.value)):
        assert mine[untouched].isnan().all()
        if int8:
            assert relative_error(mine[slots], ideal[slots]) <= int8_limit(head_dim) + ROUNDINGS * 2**-11
        else:
            close(ops, mine[slots], ideal[slots], ROUNDINGS, HIDDEN)
    assert torch.count_nonzero(ops.gpu.counters) == 0


@pytest.mark.parametrize("kinds", ["iii", "rli", "444", "sp4"])
@pytest.mark.parametrize(("block_n", "split", "rows"), [(16, 1, 18), (32, 3, 3), (64, 2, 18)])
def test_programs_that_share_a_head(ops, exact, make, close, kinds, block_n, split, rows):
    weights = projections(ops, make, kinds, 1, 1, 48)
    h, norm, heads, slots, kv, exact_kv = inputs(ops, make, rows, 1, 48, True, ops.dtype)
    prepared = ops.prepare_qkv(*weights)
    tile = TileConfig(16, block_n, int4_block_k(prepared.heads.group) if "4" in kinds else 128, 4, 1, split)
    if prepared.heads.starts is None:
        got = head_linear(ops.gpu, h, prepared.heads, heads, kv, slots, norm=norm, tile=tile)
    else:
        x = ops.linear(ops.rms_norm(h, norm.weight, norm.eps), prepared.first)
        got = head_linear(ops.gpu, x, prepared.heads, heads, kv, slots, tile=tile)
    close(ops, got, exact.attention_input(h.double(), norm, weights, heads, exact_kv, slots), ROUNDINGS, HIDDEN)
    close(ops, kv.value[slots], exact_kv.value[slots], ROUNDINGS, HIDDEN)
    assert torch.count_nonzero(ops.gpu.counters) == 0


def test_in_bf16(exact, make, close, device):
    ops = TritonOps(device, torch.bfloat16)
    for kinds in ("iii", "rli", "444", "sp4"):
        weights = projections(ops, make, kinds, 2, 1, 32)
        h, norm, heads, slots, kv, exact_kv = inputs(ops, make, 3, 1, 32, True, torch.bfloat16)
        got = ops.attention_input(h, norm, ops.prepare_qkv(*weights), heads, kv, slots)
        close(ops, got, exact.attention_input(h.double(), norm, weights, heads, exact_kv, slots), ROUNDINGS, HIDDEN)


@pytest.mark.parametrize("rows", [2, MANY])
def test_a_head_of_zeros_fits_an_int8_cache(ops, make, rows):
    weights = projections(ops, make, "iii", 1, 1, 16)
    for weight in weights:
        weight.bias = None
    h, norm, heads, slots, kv, _ = inputs(ops, make, rows, 1, 16, True, torch.int8)
    h.zero_()
    got = ops.attention_input(h, norm, ops.prepare_qkv(*weights), heads, kv, slots)
    assert torch.count_nonzero(got) == 0
    assert torch.count_nonzero(kv.key[slots]) == 0 and torch.count_nonzero(kv.value[slots]) == 0
    assert (kv.key_scale[slots] > 0).all()


def test_no_tokens(ops, make):
    for kinds in ("iii", "ldi"):
        h, norm, heads, slots, kv, _ = inputs(ops, make, 0, 1, 16, False, ops.dtype)
        weights = projections(ops, make, kinds, 2, 1, 16)
        assert ops.attention_input(h, norm, ops.prepare_qkv(*weights), heads, kv, slots).shape == (0, 2, 16)


@pytest.mark.parametrize("rows", [1, MANY])
def test_disagreeing_shapes_are_refused(ops, make, rows):
    prepared = ops.prepare_qkv(*projections(ops, make, "iii", 1, 1, 16))
    h, norm, heads, slots, kv, _ = inputs(ops, make, rows, 1, 16, False, ops.dtype)
    with pytest.raises(ValueError, match="laid out alike"):
        other = LayerKv(kv.key, make.cache(9, 4, 16, ops.dtype).value)
        ops.attention_input(h, norm, prepared, heads, other, slots)
    with pytest.raises(ValueError, match="cos"):
        half = HeadTransform(heads.cos[:, :4], heads.sin[:, :4])
        ops.attention_input(h, norm, prepared, half, kv, slots)
