"""CpuOps against the reference in float64, operation by operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu_linear
from kernels.cpu import CpuOps
from kernels.cpu_engines import EngineChoice, digit_bound, machine_choice
from kernels.cpu_linear import DigitMatrix, WidenedInt4Matrix, WidenedMatrix, lay_out_int8
from kernels.ops import LayerKv, make_ops
from kernels.reference import ReferenceOps
from kernels.weights import (
    CorrectedWeight,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    LinearWeight,
    LowRankWeight,
    pack_int4,
)

CPU = torch.device("cpu")
REFERENCE = ReferenceOps(CPU, torch.float64)
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["as chosen", "packed", "kept as stored"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuOps:
    """As chosen by size; with small matrices packed like large ones; as where torch has no int8 GEMM."""
    if request.param != "as chosen":
        monkeypatch.setattr(cpu_linear, "SMALL", 0)
    if request.param == "kept as stored":
        monkeypatch.setattr("kernels.cpu.machine_choice", lambda: EngineChoice((), "none"))
    return CpuOps(CPU)


def int8(rows: int, columns: int, bias: bool = False) -> Int8Weight:
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return Int8Weight(q, torch.rand(rows) / columns**0.5 / 60, torch.randn(rows) if bias else None)


def dense(rows: int, columns: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> DenseWeight:
    weight = (torch.randn(rows, columns) / columns**0.5).to(dtype)
    return DenseWeight(weight, torch.randn(rows).to(dtype) if bias else None)


def int4(rows: int, columns: int, group: int = 32, bias: bool = False, zeros: bool = True) -> Int4Weight:
    groups = -(-columns // group)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) / columns**0.5 / 4).half()
    zero = torch.randint(6, 11, (rows, groups), dtype=torch.uint8) if zeros else None
    return Int4Weight(pack_int4(q), scale, zero, group, columns, torch.randn(rows) if bias else None)


def error_bound(x: Tensor, weight: LinearWeight) -> Tensor:
    """float64 [T, out]: most the CPU result may differ from the exact one.

    Int8: the two-digit bound (module docstring of cpu_engines) at the coarser digit of 63. Float: K roundings of
    sum|x||w|, int4 included: its float32 weights are exact. A pair: what the first factor's error becomes through
    |up|, plus the second factor's own on an input that may be larger by that error. A correction adds its own error
    and one rounding of the sum, a bias another.
    """
    if isinstance(weight, CorrectedWeight):
        main, correction = (REFERENCE.linear(x.double(), part).abs() for part in (weight.main, weight.correction))
        both = error_bound(x, weight.main) + error_bound(x, weight.correction)
        return both * 1.001 + 4 * EPS * (main + correction) + EPS * 8
    if isinstance(weight, LowRankWeight):
        first = error_bound(x, weight.down)
        t = REFERENCE.linear(x.double(), weight.down)
        return first @ weight.up.dequantize().double().abs().t() + error_bound(t.abs() + first, weight.up)
    if isinstance(weight, Int8Weight):
        bound = digit_bound(x, weight.qweight, weight.scale, 63)
    else:
        bound = x.double().abs() @ weight.dequantize().double().abs().t() * weight.shape[1] * EPS
    return bound if weight.bias is None else bound + 4 * EPS * REFERENCE.linear(x.double(), weight).abs() + EPS * 8


def assert_linear(actual: Tensor, x: Tensor, weight: LinearWeight) -> None:
    expected = REFERENCE.linear(x.double(), weight)
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    excess = (actual - expected).abs() - error_bound(x, weight)
    assert (excess <= 0).all(), excess.max()


KINDS: dict[str, Any] = {
    "int8": lambda n, k: int8(n, k, bias=True),
    "dense": lambda n, k: dense(n, k, bias=True),
    "dense bfloat16": lambda n, k: dense(n, k, dtype=torch.bfloat16),
    "pair int8": lambda n, k: LowRankWeight(int8(50, k), int8(n, 50, bias=True)),
    "pair rank 1": lambda n, k: LowRankWeight(int8(1, k), int8(n, 1)),
    "pair float": lambda n, k: LowRankWeight(dense(50, k), dense(n, 50)),
    "pair mixed": lambda n, k: LowRankWeight(int8(50, k), dense(n, 50, bias=True)),
    "int4": lambda n, k: int4(n, k, bias=True),
    "int4 symmetric": lambda n, k: int4(n, k, zeros=False),
    "int4 wide groups": lambda n, k: int4(n, k, 128),
    "pair int4": lambda n, k: LowRankWeight(int4(51, k), int4(n, 51, bias=True)),
    "int4 corrected": lambda n, k: CorrectedWeight(int4(n, k, bias=True), LowRankWeight(int8(5, k), int8(n, 5))),
    "int8 corrected": lambda n, k: CorrectedWeight(int8(n, k), LowRankWeight(int4(5, k), int4(n, 5))),
    "float corrected": lambda n, k: CorrectedWeight(dense(n, k), LowRankWeight(dense(5, k), dense(n, 5))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 1000, 37), (7, 96, 130), (300, 33, 5)])
def test_linear(ops: CpuOps, kind: str, rows: int, columns: int, out: int) -> None:
    weight = KINDS[kind](out, columns)
    x = torch.randn(rows, columns)
    assert_linear(ops.linear(x, ops.prepare_linear(weight)), x, weight)


@pytest.mark.parametrize(
    "kinds",
    [
        ("int8", "int8", "int8"),
        ("pair int8", "pair int8", "pair rank 1"),
        ("int8", "pair int8", "dense"),
        ("dense", "pair float", "dense bfloat16"),
        ("pair mixed", "dense", "pair int8"),
        ("int4", "int4 symmetric", "int4 wide groups"),
        ("int8 corrected", "pair int4", "int4 corrected"),
        ("int4 corrected", "int8", "int4 corrected"),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_qkv(ops: CpuOps, kinds: Sequence[str], rows: int) -> None:
    weights = [KINDS[kind](out, 200) for kind, out in zip(kinds, (96, 32, 40), strict=True)]
    x = torch.randn(rows, 200)
    outputs = ops.qkv(x, ops.prepare_qkv(*weights))
    for output, weight in zip(outputs, weights, strict=True):
        assert output.is_contiguous()
        assert_linear(output, x, weight)


@pytest.mark.parametrize(
    "kinds",
    [
        ("int8", "int8"),
        ("pair int8", "int8"),
        ("dense", "pair float"),
        ("int4", "int4 corrected"),
        ("pair int4", "int8"),
    ],
)
@pytest.mark.parametrize("rows", [1, 6])
def test_gate_up(ops: CpuOps, kinds: Sequence[str], rows: int) -> None:
    gate, up = (KINDS[kind](77, 130) for kind in kinds)
    x = torch.randn(rows, 130)
    actual = ops.gate_up_silu(x, ops.prepare_gate_up(gate, up))
    g, u = REFERENCE.linear(x.double(), gate), REFERENCE.linear(x.double(), up)
    g_error, u_error = error_bound(x, gate), error_bound(x, up)
    # |silu'| < 1.1 and |silu(g)| <= |g|
    bound = 1.1 * g_error * (u.abs() + u_error) + g.abs() * u_error + 8 * EPS * (g * u).abs()
    assert ((actual - torch.nn.functional.silu(g) * u).abs() <= bound).all()


def test_projections_of_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "SMALL", 0)
    prepared = CpuOps(CPU).prepare_qkv(int8(64, 512), LowRankWeight(int8(9, 512), int8(32, 9)), int8(32, 512))
    assert len(prepared.firsts) == 1
    assert isinstance(prepared.firsts[0], DigitMatrix) and prepared.firsts[0].out_features == 64 + 9 + 32


def test_rows_of_packed_matrices_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, through every path of linear layers, also across the blocks of many rows."""
    monkeypatch.setattr(cpu_linear, "SMALL", 0)
    if not machine_choice().engines:
        pytest.skip("torch has no int8 GEMM for this machine")
    ops = CpuOps(CPU)
    qkv = ops.prepare_qkv(int8(400, 300, True), LowRankWeight(int8(20, 300), int8(48, 20, True)), int8(48, 300))
    gate_up = ops.prepare_gate_up(int8(128, 300), int8(128, 300))
    x = torch.randn(cpu_linear.DIGIT_ROWS + 5, 300)
    together = [*ops.qkv(x, qkv), ops.gate_up_silu(x, gate_up)]
    for i in (0, 3, 15, cpu_linear.DIGIT_ROWS - 1, cpu_linear.DIGIT_ROWS + 4):
        row = x[i : i + 1]
        for whole, alone in zip(together, [*ops.qkv(row, qkv), ops.gate_up_silu(row, gate_up)], strict=True):
            assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "float32", "bfloat16"])
def test_embedding(ops: CpuOps, kind: str, tied: bool) -> None:
    makers: dict[str, Any] = {"int8": int8, "int4": int4}
    table = makers[kind](90, 65) if kind in makers else dense(90, 65, dtype=getattr(torch, kind))
    prepared = ops.prepare_embedding(table, tied)
    ids = torch.tensor([5, 0, 89, 5])
    torch.testing.assert_close(ops.embed(ids, prepared), REFERENCE.embed(ids, table).float(), rtol=EPS, atol=0)
    x = torch.randn(3, 65)
    if tied:
        assert_linear(ops.logits(x, prepared), x, table)
    else:
        with pytest.raises(ValueError, match="tied_head=True"):
            ops.logits(x, prepared)


def test_logits_of_a_separate_head(ops: CpuOps) -> None:
    weight = int8(70, 64)
    x = torch.randn(2, 64)
    assert_linear(ops.logits(x, ops.prepare_linear(weight)), x, weight)


def test_nbytes() -> None:
    ops = CpuOps(CPU)
    assert ops.nbytes(ops.prepare_linear(dense(10, 30, bias=True, dtype=torch.bfloat16))) == 4 * (300 + 10)
    shared = dense(10, 30)
    assert ops.nbytes(ops.prepare_embedding(shared, tied_head=True)) == 1200
    assert ops.nbytes(ops.prepare_embedding(dense(10, 30, dtype=torch.float16), tied_head=True)) == 600 + 1200
    halves = int4(10, 31)
    assert ops.nbytes(ops.prepare_embedding(halves, tied_head=True)) == halves.nbytes == 10 * (16 + 3)
    head = int8(640, 512)
    untied, tied = (ops.nbytes(ops.prepare_embedding(head, tied_head=t)) for t in (False, True))
    assert untied == 640 * 516
    if machine_choice().engines:
        assert 2 * untied <= tied < 2.1 * untied


def test_nbytes_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cpu.machine_choice", lambda: EngineChoice((), "none"))
    ops = CpuOps(CPU)
    assert ops.linear_method == "widened"
    assert ops.nbytes(ops.prepare_embedding(int8(64, 32), tied_head=True)) == 64 * 36
    assert ops.nbytes(ops.prepare_embedding(int8(400, 512), tied_head=True)) == 400 * 516


def test_packed_matrices_stay_near_their_stored_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one engine would pad a small factor to several times its size, the other takes it."""
    monkeypatch.setattr(cpu_linear, "SMALL", 0)
    engines = machine_choice().engines
    if len(engines) < 2:
        pytest.skip("a single int8 GEMM on this machine")
    for rows, columns in ((4096, 96), (768, 192), (4096, 600), (768, 768), (2048, 1024)):
        weight = int8(rows, columns)
        matrix = lay_out_int8(weight.qweight, weight.scale, engines)
        assert isinstance(matrix, DigitMatrix)
        assert weight.nbytes <= matrix.nbytes <= 1.5 * weight.nbytes


def test_products_that_could_overflow_int32_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 2**31 // (127 * 127) + 1
    matrix = lay_out_int8(torch.ones(1, columns, dtype=torch.int8), torch.ones(1), machine_choice().engines)
    assert isinstance(matrix, WidenedMatrix)


def test_widened_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "WIDEN_ELEMENTS", 100)
    weight = int8(17, 40)
    x = torch.randn(3, 40)
    y = WidenedMatrix(weight.qweight, weight.scale, 0).multiply(x)
    bound = x.double().abs() @ weight.dequantize().double().abs().t() * 44 * EPS
    assert ((y - REFERENCE.linear(x.double(), weight)).abs() <= bound).all()


def test_widened_int4_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "WIDEN_ELEMENTS", 100)
    weight, x = int4(17, 41), torch.randn(3, 41)
    assert_linear(WidenedInt4Matrix(weight).multiply(x), x, weight)


def test_inconsistent_int4_and_corrections_are_refused() -> None:
    ops, pair = CpuOps(CPU), LowRankWeight(int8(2, 40), int8(6, 2))
    changes: dict[str, Any] = {
        "groups of 3": {"group": 3},
        r"qweight \[6, 21\], not \[6, 20\]": {"qweight": torch.zeros(6, 21, dtype=torch.uint8)},
        r"scale \[6, 1\], not \[6, 2\]": {"scale": torch.ones(6, 1).half()},
        r"zero \[5, 2\]": {"zero": torch.zeros(5, 2, dtype=torch.uint8)},
        "scales in torch.float64": {"scale": torch.ones(6, 2).double()},
        r"bias of shape \(5,\)": {"bias": torch.ones(5)},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            ops.prepare_linear(dataclasses.replace(int4(6, 40), **change))
    with pytest.raises(ValueError, match=r"\(5, 40\) has a correction of shape \(6, 40\)"):
        ops.prepare_linear(CorrectedWeight(int4(5, 40), pair))
    with pytest.raises(ValueError, match="correction has a bias"):
        ops.prepare_linear(CorrectedWeight(int4(6, 40), dataclasses.replace(pair, up=int8(6, 2, bias=True))))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16.*set dtype to float32"):
        CpuOps(CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="'triton' for CUDA"):
        CpuOps(torch.device("meta"))
    ops = CpuOps(CPU)
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        ops.prepare_qkv(int8(4, 8), int8(4, 9), int8(4, 8))
    with pytest.raises(ValueError, match="gate_proj has 4 outputs, up_proj 5"):
        ops.prepare_gate_up(int8(4, 8), int8(5, 8))
    with pytest.raises(ValueError, match="down has rank 3, up expects 2"):
        ops.prepare_linear(LowRankWeight(int8(3, 8), int8(4, 2)))
    with pytest.raises(ValueError, match=r"scales of shape \(3,\)"):
        ops.prepare_linear(dataclasses.replace(int8(4, 8), scale=torch.ones(3)))
    with pytest.raises(ValueError, match=r"bias of shape \(3,\)"):
        ops.prepare_linear(dataclasses.replace(int8(4, 8), bias=torch.ones(3)))
    with pytest.raises(ValueError, match="first factor has a bias"):
        ops.prepare_linear(LowRankWeight(int8(3, 8, bias=True), int8(4, 3)))


def test_says_what_multiplies() -> None:
    ops = make_ops(CPU, torch.float32, "cpu")
    assert isinstance(ops, CpuOps)
    assert ops.name == "cpu" and ops.dtype == torch.float32 and ops.device == CPU
    assert ops.linear_reason


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms(scale: float, weight_dtype: torch.dtype) -> None:
    ops = CpuOps(CPU)
    x = torch.randn(5, 1001) * scale
    weight = torch.randn(1001).to(weight_dtype)
    # a mean of 1001 squares halved by the root, then 3 products
    close = {"rtol": 600 * EPS, "atol": 0.0}
    heads = x[:, :960].view(5, 15, 64)
    torch.testing.assert_close(
        ops.rms_norm(heads, weight[:64], 1e-6).double(), REFERENCE.rms_norm(heads.double(), weight[:64], 1e-6), **close
    )
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-6).double(), REFERENCE.rms_norm(x.double(), weight, 1e-6), **close
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rotary_store(dtype: torch.dtype) -> None:
    def cache() -> LayerKv:
        scales = [torch.zeros(12, 3) for _ in range(2)] if dtype == torch.int8 else [None, None]
        return LayerKv(torch.zeros(12, 3, 10, dtype=dtype), torch.zeros(12, 3, 10, dtype=dtype), *scales)

    ops, mine, exact = CpuOps(CPU), cache(), cache()
    joint = torch.randn(4, 15, 10)
    q, k, v = joint[:, :9], joint[:, 9:12], joint[:, 12:]  # not contiguous, as views of one product
    before = joint.clone()
    angle = torch.randn(4, 5)
    slots = torch.tensor([11, 0, 4, 7])
    actual = ops.rotary_store(q, k, v, angle.cos(), angle.sin(), mine, slots)
    expected = REFERENCE.rotary_store(q.double(), k.double(), v.double(), angle.cos(), angle.sin(), exact, slots)
    assert torch.equal(joint, before)
    # two products and a sum, of numbers below 8
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=24 * EPS)
    assert torch.equal(mine.value, exact.value)
    # a number halfway between two of the cache's may go either way
    step = {torch.float32: 24 * EPS, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.int8: 1.0}[dtype]
    assert ((mine.key.double() - exact.key.double()).abs() <= step).all()
    assert (mine.key != exact.key).float().mean() < (1.0 if dtype == torch.float32 else 0.02)
    if mine.key_scale is not None and exact.key_scale is not None:
        torch.testing.assert_close(mine.key_scale, exact.key_scale, rtol=8 * EPS, atol=0)
