"""Matrices with a low-rank correction, wherever one may stand, against the reference in float64."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import relative_error
from kernels.gpu.configs import DECODE_ROWS, PAD
from kernels.gpu.prepared import Corrected, StackedCorrected
from kernels.reference import ReferenceOps
from kernels.weights import CorrectedWeight, LowRankWeight

HIDDEN = 200
MANY = DECODE_ROWS + 6
ROUNDINGS = 3  # between the factors, of the main product, of the sum


def mains(ops, make, out, inner):
    return {
        "int4": make.int4(out, inner, 64, False, bias=True),
        "int8": make.int8(out, inner, bias=True),
        "dense": make.dense(out, inner, ops.dtype, bias=True),
    }


def corrections(ops, make, out, inner):
    return {
        "int8": make.low_rank(out, inner, 3),
        "int4": LowRankWeight(make.int4(40, inner, 32), make.int4(out, 40, 32, False)),
        "dense": LowRankWeight(make.dense(70, inner, ops.dtype), make.dense(out, 70, ops.dtype)),
        "mixed": LowRankWeight(make.dense(7, inner, ops.dtype), make.int8(out, 7)),
    }


@pytest.mark.parametrize("main", ["int4", "int8", "dense"])
@pytest.mark.parametrize("correction", ["int8", "int4", "dense", "mixed"])
def test_every_main_with_every_correction(ops, exact, make, close, main, correction):
    weight = CorrectedWeight(mains(ops, make, 70, 200)[main], corrections(ops, make, 70, 200)[correction])
    prepared = ops.prepare_linear(weight)
    assert isinstance(prepared, Corrected)
    for rows in (1, MANY):
        x, h = make.normal(rows, 200, dtype=ops.dtype), make.normal(rows, 70, dtype=ops.dtype)
        close(ops, ops.linear(x, prepared), exact.linear(x.double(), weight), ROUNDINGS, 200)
        want = exact.add_linear(h.double(), x.double(), weight)
        got = ops.add_linear(h, x, prepared)
        close(ops, got, want, ROUNDINGS + 1, 200)  # a dense main part rounds its sum with the bias
        assert got.data_ptr() == h.data_ptr()
        logits = ops.logits(x, prepared)
        assert logits.dtype == torch.float32
        close(ops, logits, exact.linear(x.double(), weight), ROUNDINGS, 200)


def test_a_small_rank_is_padded_little(ops, make):
    correction = make.low_rank(70, 200, 3)
    prepared = ops.prepare_linear(CorrectedWeight(make.int8(70, 200), correction))
    assert ops.nbytes(prepared.correction) == 32 * 2 * PAD + 32 * 4 + 70 * 32 + 70 * 4
    prepared = ops.prepare_linear(CorrectedWeight(make.int8(70, 200), make.low_rank(70, 200, 65)))
    assert ops.nbytes(prepared.correction) == PAD * 2 * PAD + PAD * 4 + 70 * PAD + 70 * 4


def qkv(ops, make, kinds):
    shapes = (64, 32, 32)
    choices = {
        "i": lambda n: make.int8(n, HIDDEN, bias=True),
        "I": lambda n: make.corrected(make.int8(n, HIDDEN), 3),
        "f": lambda n: make.int4(n, HIDDEN, 64, n == 64, bias=True),
        "F": lambda n: make.corrected(make.int4(n, HIDDEN, 32, n == 32), 40),
        "L": lambda n: make.low_rank(n, HIDDEN, 5),
        "D": lambda n: make.corrected(make.dense(n, HIDDEN, ops.dtype), 7),
    }
    return [choices[kind](n) for kind, n in zip(kinds, shapes, strict=True)]


@pytest.mark.parametrize(
    ("kinds", "stacked"),
    [("FFF", True), ("fFf", True), ("IiI", True), ("FII", False), ("FLf", False), ("DiF", False)],
)
@pytest.mark.parametrize("rows", [2, MANY])
def test_attention_input(ops, exact, make, close, kinds, stacked, rows):
    weights = qkv(ops, make, kinds)
    h, norm = 3 * make.normal(rows, HIDDEN, dtype=ops.dtype), make.norm(HIDDEN, ops.dtype)
    heads, slots = make.heads(rows, 32, ops.dtype, True), torch.randperm(rows + 3, device=ops.device)[:rows]
    kv, exact_kv = (make.cache(rows + 3, 1, 32, dtype) for dtype in (ops.dtype, torch.float64))
    prepared, before = ops.prepare_qkv(*weights), h.clone()
    assert isinstance(prepared, StackedCorrected) == stacked and ops.nbytes(prepared) > 0
    got = ops.attention_input(h, norm, prepared, heads, kv, slots)
    want = exact.attention_input(h.double(), norm, weights, heads, exact_kv, slots)
    assert torch.equal(h, before)
    # Roundings: of the norm, between factors, of the main product, of the sum, of the result.
    close(ops, got, want, 5, HIDDEN)
    close(ops, kv.key[slots], exact_kv.key[slots], 5, HIDDEN)
    close(ops, kv.value[slots], exact_kv.value[slots], 5, HIDDEN)


@pytest.mark.parametrize("kinds", ["FF", "fF", "Ii", "iF"])
@pytest.mark.parametrize("rows", [1, MANY])
def test_mlp(ops, exact, make, close, kinds, rows):
    gate, up = (
        make.corrected(make.int4(40, 200, 64), 3) if kind == "F"
        else make.corrected(make.int8(40, 200, bias=True), 70) if kind == "I"
        else make.int4(40, 200) if kind == "f"
        else make.int8(40, 200)
        for kind in kinds
    )  # fmt: skip
    prepared, down = ops.prepare_gate_up(gate, up), make.corrected(make.int4(200, 40, 32), 3)
    assert isinstance(prepared, StackedCorrected) == (kinds != "iF")
    h, norm = 3 * make.normal(rows, 200, dtype=ops.dtype), make.norm(200, ops.dtype)
    hidden = ops.mlp_input(h, norm, prepared)
    assert hidden.shape == (rows, 40)
    # As in test_products; each of gate and up is rounded twice more, and gate counts double.
    close(ops, hidden, exact.mlp_input(h.double(), norm, (gate, up)), 12, 4 * 200)
    want = exact.add_linear(h.double(), hidden.double(), down)
    close(ops, ops.add_linear(h.clone(), hidden, ops.prepare_linear(down)), want, ROUNDINGS, 40)


def test_in_bf16(exact, make, close, device):
    ops = TritonOps(device, torch.bfloat16)
    weight, x = make.corrected(make.int4(40, 200, 64, False), 3), make.normal(3, 200, dtype=torch.bfloat16)
    close(ops, ops.linear(x, ops.prepare_linear(weight)), exact.linear(x.double(), weight), ROUNDINGS, 200)


@pytest.mark.parametrize("main", ["int8", "int4"])
def test_corrections_are_spared_int8_activations(make, close, device, main):
    # Only the main part of int8 rounds its input; what is left is the error of ties, as in test_int8_prefill.
    ops = TritonOps(device, torch.float32, int8_prefill=True)
    emulated = ReferenceOps(device, torch.float64, int8_prefill_above=DECODE_ROWS)
    matrix = make.int8(70, 200) if main == "int8" else make.int4(70, 200)
    weight = CorrectedWeight(matrix, make.low_rank(70, 200, 3))
    x, h = make.normal(MANY, 200), make.normal(MANY, 70)
    got = ops.add_linear(h.clone(), x, ops.prepare_linear(weight))
    assert relative_error(got, emulated.add_linear(h.double(), x.double(), weight)) < 1e-4
    pair, norm = (weight, CorrectedWeight(matrix, make.low_rank(70, 200, 3))), make.norm(200, torch.float32)
    got = ops.mlp_input(x, norm, ops.prepare_gate_up(*pair))
    assert relative_error(got, emulated.mlp_input(x.double(), norm, pair)) < 1e-3


def test_disagreeing_shapes_are_refused(ops, make):
    for other in (make.low_rank(9, 72, 3), make.low_rank(10, 71, 3)):
        with pytest.raises(ValueError, match="does not fit"):
            ops.prepare_linear(CorrectedWeight(make.int4(10, 72), other))
        with pytest.raises(ValueError, match="does not fit"):
            good = make.int4(10, 72)
            ops.prepare_gate_up(CorrectedWeight(good, other), good)
