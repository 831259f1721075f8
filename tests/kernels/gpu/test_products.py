"""The products of `TritonOps`, with all that is folded into them, against the reference in float64 at odd sizes."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.configs import DECODE_ROWS, PAD, TileConfig
from kernels.gpu.gate_up import gate_up_silu
from kernels.gpu.packed_linear import packed_linear
from kernels.weights import DenseWeight, Int8Weight, LowRankWeight

MANY = DECODE_ROWS + 6  # rows beyond the decode kernels
INTERPRETED = {"num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("rows", [1, 17, MANY])
@pytest.mark.parametrize(("out", "inner"), [(130, 300), (1, 1)])
def test_int8(ops, exact, make, close, rows, out, inner):
    weight = make.int8(out, inner, bias=rows != 17)
    x, h = make.normal(rows, inner, dtype=ops.dtype), make.normal(rows, out, dtype=ops.dtype)
    prepared = ops.prepare_linear(weight)
    got = ops.linear(x, prepared)
    assert got.dtype == ops.dtype and got.is_contiguous()
    close(ops, got, exact.linear(x.double(), weight), 1, inner)
    want = exact.add_linear(h.double(), x.double(), weight)
    got = ops.add_linear(h, x, prepared)
    close(ops, got, want, 1, inner)
    assert got.data_ptr() == h.data_ptr()


def test_every_int8_value(ops, device):
    weight = Int8Weight(
        torch.arange(-128, 128, device=device).to(torch.int8).view(256, 1), torch.ones(256, device=device)
    )
    got = ops.linear(torch.ones(1, 1, dtype=ops.dtype, device=device), ops.prepare_linear(weight))
    assert got[0].tolist() == list(range(-128, 128))


@pytest.mark.parametrize("rank", [1, 129])
def test_low_rank(ops, exact, make, close, rank):
    weight = make.low_rank(70, 200, rank, bias=True)
    x, h = make.normal(5, 200, dtype=ops.dtype), make.normal(5, 70, dtype=ops.dtype)
    prepared = ops.prepare_linear(weight)
    close(ops, ops.linear(x, prepared), exact.linear(x.double(), weight), 2, 200)
    want = exact.add_linear(h.double(), x.double(), weight)
    close(ops, ops.add_linear(h, x, prepared), want, 2, 200)


def test_float_matrices_and_mixed_pairs(ops, exact, make, close):
    down, up = make.int8(20, 50), make.int8(30, 20)
    dense_down, dense_up = make.dense(20, 50, ops.dtype), make.dense(30, 20, ops.dtype, bias=True)
    x = make.normal(3, 50, dtype=ops.dtype)
    pairs = [LowRankWeight(a, b) for a in (down, dense_down) for b in (up, dense_up)]
    for weight in [*pairs, make.dense(30, 50, ops.dtype, bias=True)]:
        h = make.normal(3, 30, dtype=ops.dtype)
        close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 2, 50)
        want = exact.add_linear(h.double(), x.double(), weight)
        close(ops, ops.add_linear(h, x, ops.prepare_linear(weight)), want, 3, 50)


@pytest.mark.parametrize(("split", "rows"), [(1, 2), (2, 18), (3, 2), (5, 18)])
def test_programs_that_share_k(ops, exact, make, close, split, rows):
    # 3 steps of 128: shared unevenly, or by more programs than there are steps.
    weight, norm = make.int8(20, 300, bias=True), make.norm(300, ops.dtype)
    x, h = make.normal(rows, 300, dtype=ops.dtype), make.normal(rows, 20, dtype=ops.dtype)
    tile = TileConfig(16, 16, 128, split_k=split, **INTERPRETED)
    matrix = ops.prepare_linear(weight)
    normed = exact.rms_norm(x.double(), norm.weight, norm.eps)
    got = packed_linear(ops.gpu, x, matrix, ops.dtype, norm=norm, tile=tile)
    close(ops, got, exact.linear(normed, weight), 2, 300)
    want = exact.add_linear(h.double(), x.double(), weight)
    close(ops, packed_linear(ops.gpu, x, matrix, ops.dtype, add_to=h, tile=tile), want, 1, 300)
    assert torch.count_nonzero(ops.gpu.counters) == 0  # ready for the next launch


@pytest.mark.parametrize("rows", [1, 4, 5, 17])
def test_a_folded_norm_is_one_rounding(ops, exact, make, close, rows):
    # x * weight is rounded once, as the norm itself would be: rows of any size, and rows of zeros.
    weight, norm = make.int8(64, 200), make.norm(200, ops.dtype)
    x = make.normal(rows, 200, dtype=ops.dtype) * torch.logspace(-2, 2, rows, device=ops.device).to(ops.dtype)[:, None]
    x[rows - 1] = 0
    got = packed_linear(ops.gpu, x, ops.prepare_linear(weight), torch.float32, norm=norm)
    want = exact.linear(exact.rms_norm(x.double(), norm.weight, norm.eps), weight)
    assert torch.count_nonzero(got[rows - 1]) == 0
    for r in range(rows - 1):
        close(ops, got[r], want[r], 1, 200)


@pytest.mark.parametrize("rows", [1, 5, MANY])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_feeds_its_padded_width_down_without_a_copy(ops, exact, make, close, rows, bias):
    width = 40
    gate, up, down = make.int8(width, 200, bias), make.int8(width, 200), make.int8(200, width)
    h, norm = 3 * make.normal(rows, 200, dtype=ops.dtype), make.norm(200, ops.dtype)
    before = h.clone()
    hidden = ops.mlp_input(h, norm, ops.prepare_gate_up(gate, up))
    assert torch.equal(h, before)
    assert hidden.shape == (rows, width) and hidden.stride(0) == PAD
    padding = hidden.as_strided((rows, PAD - width), (PAD, 1), hidden.storage_offset() + width)
    assert torch.count_nonzero(padding) == 0
    close(ops, hidden, exact.mlp_input(h.double(), norm, (gate, up)), 4, 4 * 200)  # 4: see check_correctness
    prepared = ops.prepare_linear(down)
    close(ops, ops.linear(hidden, prepared), exact.linear(hidden.double(), down), 1, width)
    assert torch.equal(ops.linear(hidden, prepared), ops.linear(hidden.contiguous(), prepared))


def test_mlp_of_float_and_low_rank_projections(ops, exact, make, close):
    h, norm = make.normal(3, 50, dtype=ops.dtype), make.norm(50, ops.dtype)
    for pair in (
        (make.dense(30, 50, ops.dtype), make.dense(30, 50, ops.dtype)),
        (make.low_rank(30, 50, 7), make.int8(30, 50)),
    ):
        got = ops.mlp_input(h, norm, ops.prepare_gate_up(*pair))
        close(ops, got, exact.mlp_input(h.double(), norm, pair), 8, 4 * 50)


@pytest.mark.parametrize("table", ["int8", "dense"])
def test_embedding_and_tied_head(ops, exact, make, close, device, table):
    weight = make.int8(131, 72) if table == "int8" else make.dense(131, 72, ops.dtype)
    prepared = ops.prepare_embedding(weight, tied_head=True)
    ids = torch.tensor([0, 130, 7, 7], device=device)
    close(ops, ops.embed(ids, prepared), exact.embed(ids, weight), 1, 1)
    x = make.normal(2, 72, dtype=ops.dtype)
    got = ops.logits(x, prepared)
    assert got.dtype == torch.float32
    close(ops, got, exact.linear(x.double(), weight), 0 if table == "int8" else 1, 72)


@pytest.mark.parametrize("shape", [(3, 72), (2, 3, 80), (1, 1025)])
def test_norms(ops, exact, make, close, shape):
    x, norm = make.normal(*shape, dtype=ops.dtype), make.norm(shape[-1], ops.dtype)
    want = exact.rms_norm(x.double(), norm.weight, norm.eps)
    close(ops, ops.rms_norm(x, norm.weight, norm.eps), want, 1, shape[-1])


def test_products_in_bf16(exact, make, close, device):
    ops = TritonOps(device, torch.bfloat16)
    weight, x = make.low_rank(40, 200, 3), make.normal(3, 200, dtype=torch.bfloat16)
    close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 2, 200)
    pair, norm = (make.int8(9, 200), make.int8(9, 200)), make.norm(200, torch.bfloat16)
    hidden = gate_up_silu(ops.gpu, x, ops.prepare_gate_up(*pair).matrix, 9, norm=norm)
    close(ops, hidden, exact.mlp_input(x.double(), norm, pair), 4, 800)


def test_nbytes_counts_padding(ops, make):
    size = torch.finfo(ops.dtype).bits // 8
    assert ops.nbytes(ops.prepare_linear(make.int8(10, 100, bias=True))) == 10 * PAD + 2 * 10 * 4
    assert ops.nbytes(ops.prepare_linear(make.low_rank(10, 100, 3))) == PAD * PAD + PAD * 4 + 10 * PAD + 10 * 4
    assert ops.nbytes(ops.prepare_gate_up(make.int8(10, 100), make.int8(10, 100))) == 2 * PAD * (PAD + 4)
    plain, dense, pair = make.int8(10, 100), make.dense(10, 100, torch.float32), make.low_rank(10, 100, 3)
    assert ops.nbytes(ops.prepare_qkv(plain, dense, dense)) == 10 * (PAD + 4) + 2 * 10 * 100 * size
    assert ops.nbytes(ops.prepare_qkv(plain, plain, plain)) == 3 * 10 * (PAD + 4)
    firsts, seconds = (PAD + 2 * 10) * (PAD + 4), 10 * PAD + 3 * 10 * 4
    assert ops.nbytes(ops.prepare_qkv(pair, plain, plain)) == firsts + seconds


def test_no_tokens(ops, make):
    h, norm = make.normal(0, 72, dtype=ops.dtype), make.norm(72, ops.dtype)
    assert ops.linear(h, ops.prepare_linear(make.int8(10, 72))).shape == (0, 10)
    assert ops.mlp_input(h, norm, ops.prepare_gate_up(make.int8(9, 72), make.int8(9, 72))).shape == (0, 9)
    assert ops.rms_norm(h, norm.weight, norm.eps).shape == (0, 72)


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
    with pytest.raises(ValueError, match="cannot take"):
        ops.add_linear(make.normal(3, 11, dtype=ops.dtype), make.normal(3, 72, dtype=ops.dtype), ops.prepare_linear(a))


def test_wrong_device_or_dtype_is_refused(device):
    with pytest.raises(ValueError, match="float64"):
        TritonOps(device, torch.float64)
    with pytest.raises(RuntimeError, match="meta"):
        TritonOps(torch.device("meta"), torch.float16)
