"""int4 through the products of `TritonOps`: odd sizes, every group, with and without zero points, in every dtype."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.configs import DECODE_ROWS, PAD, TileConfig, int4_block_k
from kernels.gpu.gate_up import gate_up_silu
from kernels.gpu.packed_linear import packed_linear
from kernels.gpu.prepared import FusedGateUp
from kernels.weights import Int4Weight, LowRankWeight, pack_int4

MANY = DECODE_ROWS + 6  # rows beyond the decode kernels
INTERPRETED = {"num_warps": 4, "num_stages": 1}
SHAPES = [  # out, in, group, symmetric
    (130, 300, 128, True),
    (20, 300, 64, False),
    (33, 129, 32, True),
    (16, 72, 16, False),
    (16, 200, 48, False),  # served as groups of 16
    (40, 600, 256, False),  # served as groups of 128
    (7, 40, 64, False),  # one group, shorter than it could be
    (5, 20, 36, True),  # one group of a size that no kernel has
    (1, 1, 128, True),
]


@pytest.mark.parametrize(
    ("out", "inner", "group", "symmetric", "rows"),
    [(*shape, rows) for shape, rows in zip(SHAPES, (1, 17, MANY, 5, 2, 3, 1, MANY, 1), strict=True)],
)
def test_int4(ops, exact, make, close, out, inner, group, symmetric, rows):
    weight = make.int4(out, inner, group, symmetric, bias=rows != 17)
    x, h = make.normal(rows, inner, dtype=ops.dtype), make.normal(rows, out, dtype=ops.dtype)
    prepared = ops.prepare_linear(weight)
    got = ops.linear(x, prepared)
    assert got.dtype == ops.dtype and got.is_contiguous()
    close(ops, got, exact.linear(x.double(), weight), 1, inner)
    want = exact.add_linear(h.double(), x.double(), weight)
    got = ops.add_linear(h, x, prepared)
    close(ops, got, want, 1, inner)
    assert got.data_ptr() == h.data_ptr()


@pytest.mark.parametrize(("out", "inner", "group", "symmetric"), SHAPES[:4])
def test_in_bf16(exact, make, close, device, out, inner, group, symmetric):
    ops = TritonOps(device, torch.bfloat16)
    weight, x = make.int4(out, inner, group, symmetric), make.normal(3, inner, dtype=torch.bfloat16)
    close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), 1, inner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [1, 32, 64, 127])  # in each of the four quarters
def test_every_integer_less_every_zero_point_is_exact(device, dtype, position):
    # Row 16 z + q holds q at one input, with zero point z: what comes out is q - z.
    q, zero = torch.arange(16, dtype=torch.uint8).repeat(16), torch.arange(16, dtype=torch.uint8).repeat_interleave(16)
    integers = torch.zeros(256, position + 1, dtype=torch.uint8)
    integers[:, position] = q
    groups = -(-(position + 1) // 64)
    scale, zeros = torch.ones(256, groups, dtype=torch.float16), zero[:, None].expand(256, groups).contiguous()
    weight = Int4Weight(pack_int4(integers), scale, zeros, 64, position + 1)
    ops, x = TritonOps(device, dtype), torch.zeros(1, position + 1, dtype=dtype)
    x[0, position] = 1
    got = ops.linear(x.to(device), ops.prepare_linear(weight))
    assert torch.equal(got[0].float().cpu(), q.float() - zero.float())


def test_scales_beyond_float16(ops, exact, make, close):
    # After balancing scales are float32, and a sum of a group times its scale never is anything else.
    weight = make.int4(20, 200, 32)
    weight.scale = weight.scale.float() * torch.logspace(-9, 2, 20, device=ops.device)[:, None]
    x = make.normal(3, 200, dtype=ops.dtype)
    got = packed_linear(ops.gpu, x, ops.prepare_linear(weight), torch.float32)
    want = exact.linear(x.double(), weight)
    for column in range(20):
        close(ops, got[:, column], want[:, column], 0, 200)


@pytest.mark.parametrize(("split", "rows"), [(2, 18), (5, 2)])
@pytest.mark.parametrize("group", [128, 16])
def test_programs_that_share_k(ops, exact, make, close, group, split, rows):
    weight, norm = make.int4(20, 300, group, False, bias=True), make.norm(300, ops.dtype)
    x, h = make.normal(rows, 300, dtype=ops.dtype), make.normal(rows, 20, dtype=ops.dtype)
    tile = TileConfig(16, 16, int4_block_k(group), split_k=split, **INTERPRETED)
    matrix = ops.prepare_linear(weight)
    normed = exact.rms_norm(x.double(), norm.weight, norm.eps)
    got = packed_linear(ops.gpu, x, matrix, ops.dtype, norm=norm, tile=tile)
    close(ops, got, exact.linear(normed, weight), 2, 300)
    want = exact.add_linear(h.double(), x.double(), weight)
    close(ops, packed_linear(ops.gpu, x, matrix, ops.dtype, add_to=h, tile=tile), want, 1, 300)
    assert torch.count_nonzero(ops.gpu.counters) == 0  # ready for the next launch


@pytest.mark.parametrize("rows", [1, 17])
def test_a_folded_norm_is_one_rounding(ops, exact, make, close, rows):
    weight, norm = make.int4(64, 200, 32, False), make.norm(200, ops.dtype)
    x = make.normal(rows, 200, dtype=ops.dtype) * torch.logspace(-2, 2, rows, device=ops.device).to(ops.dtype)[:, None]
    got = packed_linear(ops.gpu, x, ops.prepare_linear(weight), torch.float32, norm=norm)
    want = exact.linear(exact.rms_norm(x.double(), norm.weight, norm.eps), weight)
    for r in range(rows):
        close(ops, got[r], want[r], 1, 200)


@pytest.mark.parametrize("rank", [40, 129])
def test_pairs_of_any_two_kinds(ops, exact, make, close, rank):
    downs = [make.int4(rank, 200, 64), make.int8(rank, 200), make.dense(rank, 200, ops.dtype)]
    ups = [make.int4(70, rank, 64, False, bias=True), make.int8(70, rank), make.dense(70, rank, ops.dtype)]
    x, h = make.normal(5, 200, dtype=ops.dtype), make.normal(5, 70, dtype=ops.dtype)
    for weight in (LowRankWeight(down, up) for down in downs for up in ups):
        if isinstance(weight.down, Int4Weight) or isinstance(weight.up, Int4Weight):
            prepared = ops.prepare_linear(weight)
            close(ops, ops.linear(x, prepared), exact.linear(x.double(), weight), 2, 200)
            want = exact.add_linear(h.double(), x.double(), weight)
            close(ops, ops.add_linear(h.clone(), x, prepared), want, 3, 200)


@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize(("groups", "symmetric"), [((128, 128), True), ((64, 32), False)])
def test_gate_and_up_in_one_launch(ops, exact, make, close, rows, groups, symmetric):
    width = 40
    gate, up = make.int4(width, 200, groups[0], True, bias=rows == 1), make.int4(width, 200, groups[1], symmetric)
    down = make.int4(200, width, 32)
    h, norm = 3 * make.normal(rows, 200, dtype=ops.dtype), make.norm(200, ops.dtype)
    prepared = ops.prepare_gate_up(gate, up)
    assert isinstance(prepared, FusedGateUp)
    hidden = ops.mlp_input(h, norm, prepared)
    assert hidden.shape == (rows, width) and hidden.stride(0) == PAD
    padding = hidden.as_strided((rows, PAD - width), (PAD, 1), hidden.storage_offset() + width)
    assert torch.count_nonzero(padding) == 0
    close(ops, hidden, exact.mlp_input(h.double(), norm, (gate, up)), 4, 4 * 200)  # 4: see check_correctness
    prepared = ops.prepare_linear(down)
    close(ops, ops.linear(hidden, prepared), exact.linear(hidden.double(), down), 1, width)


def test_gate_and_up_in_bf16(exact, make, close, device):
    ops = TritonOps(device, torch.bfloat16)
    pair, norm = (make.int4(9, 200, 64, False), make.int4(9, 200, 64)), make.norm(200, torch.bfloat16)
    x = make.normal(3, 200, dtype=torch.bfloat16)
    hidden = gate_up_silu(ops.gpu, x, ops.prepare_gate_up(*pair).matrix, 9, norm=norm)
    close(ops, hidden, exact.mlp_input(x.double(), norm, pair), 4, 800)


@pytest.mark.parametrize(("group", "symmetric"), [(128, True), (32, False), (16, False)])
def test_embedding_and_tied_head(ops, exact, make, close, device, group, symmetric):
    weight = make.int4(131, 200, group, symmetric)
    prepared = ops.prepare_embedding(weight, tied_head=True)
    ids = torch.tensor([0, 130, 7, 7], device=device)
    close(ops, ops.embed(ids, prepared), exact.embed(ids, weight), 1, 1)
    x = make.normal(2, 200, dtype=ops.dtype)
    got = ops.logits(x, prepared)
    assert got.dtype == torch.float32
    close(ops, got, exact.linear(x.double(), weight), 0, 200)


def test_nbytes_counts_padding(ops, make):
    rows, words = 10, 10 * 2 * PAD // 2  # 200 inputs are padded to 256
    assert ops.nbytes(ops.prepare_linear(make.int4(rows, 200, 128))) == words + rows * 2 * 2
    assert ops.nbytes(ops.prepare_linear(make.int4(rows, 200, 32, False, bias=True))) == words + rows * 8 * 3 + rows * 4
    table = make.int4(rows, 200, 64)
    assert ops.nbytes(ops.prepare_embedding(table, tied_head=True)) == words + rows * 4 * 2


def test_no_tokens(ops, make):
    h, norm = make.normal(0, 72, dtype=ops.dtype), make.norm(72, ops.dtype)
    assert ops.linear(h, ops.prepare_linear(make.int4(10, 72))).shape == (0, 10)
    assert ops.mlp_input(h, norm, ops.prepare_gate_up(make.int4(9, 72), make.int4(9, 72))).shape == (0, 9)


def test_what_no_kernel_serves_is_refused(ops, make):
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.prepare_linear(make.int4(10, 72, 24))
    good = make.int4(10, 72, 32, False)
    short = Int4Weight(good.qweight, good.scale[:, :2], good.zero, 32, 72)
    for bad, name in (
        (short, "scale"),
        (Int4Weight(good.qweight[:, 1:], good.scale, good.zero, 32, 72), "qweight"),
        (Int4Weight(good.qweight, good.scale, good.zero[1:], 32, 72), "zero"),
        (Int4Weight(good.qweight, good.scale, good.zero.int(), 32, 72), "zero"),
        (Int4Weight(good.qweight, good.scale, good.zero, 32, 72, good.scale[:9, 0]), "bias"),
    ):
        with pytest.raises(ValueError, match=name):
            ops.prepare_linear(bad)
    with pytest.raises(ValueError, match=r"pair|rank"):
        ops.prepare_linear(LowRankWeight(good, make.int4(5, 9, 32)))
