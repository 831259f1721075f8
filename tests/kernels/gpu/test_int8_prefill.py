"""The W8A8 mode of long steps: what it rounds, how much that costs, and that short steps and logits are spared."""

import pytest
import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import error_limit, relative_error
from kernels.gpu.configs import DECODE_ROWS
from kernels.gpu.int8_prefill import int8_rows_linear, quantize_rows
from kernels.reference import ReferenceOps, int8_rows

MANY = DECODE_ROWS + 2
TIES = 2e-4  # share of values that may round to the other side, as float32 decides a tie the exact quotient does not


@pytest.fixture
def w8a8(ops, device):
    return TritonOps(device, ops.dtype, int8_prefill=True)


@pytest.fixture
def emulated(device):
    return ReferenceOps(device, torch.float64, int8_prefill_above=DECODE_ROWS)


def quantization_limit(x):
    """A step is absmax / 127 and its rounding error uniform in +-step / 2: relative to the root mean square of a row
    that is absmax / rms / (127 sqrt(12)); the worst row bounds them all."""
    return (x.abs().amax(-1) / x.pow(2).mean(-1).sqrt()).max().item() / (127 * 12**0.5)


@pytest.mark.parametrize("n", [1, 200, 256])
def test_rows_are_rounded_as_the_emulation_rounds(ops, make, n):
    x = make.normal(5, n, dtype=ops.dtype) * torch.logspace(-2, 2, 5, device=ops.device).to(ops.dtype)[:, None]
    x[3] = 0
    rows = quantize_rows(x, 256)
    assert torch.count_nonzero(rows.values[:, n:]) == 0 and torch.count_nonzero(rows.values[3]) == 0
    got, want = rows.values[:, :n].double() * rows.step.double()[:, None], int8_rows(x.double())
    assert ((got - want).abs() <= 1.01 * rows.step.double()[:, None]).all()
    assert ((got - want).abs() > 0.5 * rows.step[:, None]).double().mean() <= TIES


def test_the_product_of_rounded_rows_is_exact(ops, make, device):
    # Integers below 2^24 add up exactly; then two products and a rounding.
    weight, x = make.int8(70, 300, bias=True), make.normal(MANY, 300, dtype=ops.dtype)
    rows = quantize_rows(x, 384)
    got = int8_rows_linear(ops.gpu, rows, ops.prepare_linear(weight), torch.float32)
    sums = rows.values[:, :300].double() @ weight.qweight.double().T
    want = sums * rows.step.double()[:, None] * weight.scale.double() + weight.bias.double()
    assert relative_error(got, want) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", ["int8", "low rank"])
def test_layers_stay_within_the_error_of_rounding(w8a8, exact, emulated, make, kind):
    weight = make.int8(70, 300) if kind == "int8" else make.low_rank(70, 300, 130)
    x, h = make.normal(MANY, 300, dtype=w8a8.dtype), make.normal(MANY, 70, dtype=w8a8.dtype)
    h.zero_()
    got = w8a8.add_linear(h.clone(), x, w8a8.prepare_linear(weight))
    limit = error_limit(w8a8.dtype, w8a8.device, 2, 300)
    quantized = quantization_limit(x.double())
    if kind == "low rank":
        quantized += quantization_limit(exact.linear(x.double(), weight.down))
    error = relative_error(got, exact.add_linear(h.double(), x.double(), weight))
    assert limit < error <= limit + quantized  # it was rounded, and by no more than that
    ties = quantized * TIES**0.5 * 2 if kind == "int8" else quantized  # a second rounding sees other values
    assert relative_error(got, emulated.add_linear(h.double(), x.double(), weight)) <= limit + ties


@pytest.mark.parametrize("kinds", ["iii", "rri"])
def test_attention_input_and_mlp_input(w8a8, exact, make, kinds):
    norm, h = make.norm(200, w8a8.dtype), 3 * make.normal(MANY, 200, dtype=w8a8.dtype)
    weights = [make.int8(32, 200) if kind == "i" else make.low_rank(32, 200, 130) for kind in kinds]
    heads, slots = make.heads(MANY, 32, w8a8.dtype), torch.arange(MANY, device=w8a8.device)
    kv, exact_kv = (make.cache(MANY, 1, 32, dtype) for dtype in (w8a8.dtype, torch.float64))
    got = w8a8.attention_input(h, norm, w8a8.prepare_qkv(*weights), heads, kv, slots)
    want = exact.attention_input(h.double(), norm, weights, heads, exact_kv, slots)
    normed = exact.rms_norm(h.double(), norm.weight, norm.eps)
    limit = error_limit(w8a8.dtype, w8a8.device, 3, 200) + 2 * quantization_limit(normed)
    assert relative_error(got, want) <= limit and relative_error(kv.value, exact_kv.value) <= limit
    pair = (make.int8(40, 200, bias=True), make.int8(40, 200))
    hidden = w8a8.mlp_input(h, norm, w8a8.prepare_gate_up(*pair))
    want = exact.mlp_input(h.double(), norm, pair)
    assert hidden.shape == (MANY, 40) and relative_error(hidden, want) <= 2 * limit
    down = make.int8(200, 40)
    got = w8a8.add_linear(h.clone(), hidden, w8a8.prepare_linear(down))
    assert relative_error(got, exact.add_linear(h.double(), hidden.double(), down)) <= limit


def test_short_steps_and_logits_are_not_rounded(ops, w8a8, make):
    weight, x = make.int8(70, 200), make.normal(MANY, 200, dtype=ops.dtype)
    few, h = x[:DECODE_ROWS], make.normal(DECODE_ROWS, 70, dtype=ops.dtype)
    plain = ops.prepare_linear(weight)
    assert torch.equal(w8a8.add_linear(h.clone(), few, plain), ops.add_linear(h.clone(), few, plain))
    assert torch.equal(w8a8.logits(x, plain), ops.logits(x, plain))
