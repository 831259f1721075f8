"""The integer GEMMs: within the derived bound wherever they are used, refused where they are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cpu_engines import (
    Engine,
    Onednn,
    choose,
    digit_bound,
    machine_choice,
    two_digit_product,
    worst_error,
)

ENGINES = machine_choice().engines
needs_engine = pytest.mark.skipif(not ENGINES, reason="torch has no int8 GEMM for this machine")


class Exact:
    """An engine in float64: the arithmetic the others stand for."""

    name = "exact"

    def __init__(self, digit: int = 63) -> None:
        self.digit = digit

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        return qweight.double() * scale.double()[:, None]

    def multiply(self, digits: Tensor, packed: Any) -> Tensor:
        return (digits.round().double() @ packed.t()).float()

    def packed_nbytes(self, rows: int, columns: int) -> int:
        return 8 * rows * columns


class Saturating(Exact):
    """vpmaddubsw as it is: sums of two neighbouring products stop at 16 bits."""

    name = "saturating"

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        return qweight, scale

    def multiply(self, digits: Tensor, packed: Any) -> Tensor:
        qweight, scale = packed
        offset = self.digit + 1
        unsigned = (digits.round() + offset).int()
        products = unsigned[:, None, :] * qweight.int()  # [M, N, K]
        if products.shape[-1] % 2:
            products = torch.nn.functional.pad(products, (0, 1))
        pairs = (products[..., 0::2] + products[..., 1::2]).clamp(-32768, 32767)
        return (pairs.sum(-1) - offset * qweight.long().sum(-1)) * scale


class OffByOneScale(Exact):
    """The scale of the row before: right only where all scales are equal."""

    name = "shifted"

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        return super().pack(qweight, scale.roll(1))


class Absent(Exact):
    name = "absent"

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        raise RuntimeError("Didn't find engine\nfor this operation")


def test_saturation_is_what_limits_the_digit() -> None:
    assert worst_error(Saturating(63)) <= 1
    assert worst_error(Saturating(127)) > 1000


def test_self_test_drops_wrong_and_absent_engines_and_says_so() -> None:
    choice = choose([Absent(), Saturating(127), OffByOneScale(), Saturating(63), Exact()])
    assert [(e.name, e.digit) for e in choice.engines] == [("saturating", 63), ("exact", 63)]
    assert "absent with digits to 63: not available (Didn't find engine)" in choice.reason
    assert "saturating with digits to 127: WRONG" in choice.reason
    assert "shifted with digits to 63: WRONG" in choice.reason


def test_without_an_engine_the_choice_says_what_happens() -> None:
    choice = choose([Absent()])
    assert choice.engines == ()
    assert choice.reason.endswith("weights are widened to float32 at each use")


def test_engines_beyond_this_processor_are_refused() -> None:
    """Without VNNI, digits to 127 saturate on real silicon; the self-test must see it."""
    if torch.cpu._is_vnni_supported() or not any(isinstance(e, Onednn) for e in ENGINES):
        pytest.skip("a processor with VNNI, or no oneDNN")
    assert worst_error(Onednn(127)) > 1000
    assert all(engine.digit == 63 for engine in ENGINES)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize(
    ("rows", "columns", "out"), [(1, 1, 1), (1, 1000, 37), (7, 1000, 300), (16, 513, 129), (3, 1040, 2)]
)
@pytest.mark.parametrize("inputs", ["gauss", "zero rows", "tiny", "huge", "one channel x300", "constant"])
def test_error_is_within_the_bound(engine: Engine, rows: int, columns: int, out: int, inputs: str) -> None:
    torch.manual_seed(rows + columns)
    qweight = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
    scale = torch.rand(out) / 100
    x = torch.randn(rows, columns)
    if inputs == "zero rows":
        x[::2] = 0
        scale[0] = 0
    elif inputs == "tiny":
        x *= 1e-12
    elif inputs == "huge":
        x *= 1e30
    elif inputs == "one channel x300":
        x[:, columns // 2] *= 300
    elif inputs == "constant":
        x[:] = 0.7
    y = two_digit_product(x, engine.pack(qweight, scale), engine)
    exact = x.double() @ qweight.double().t() * scale.double()
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= digit_bound(x, qweight, scale, engine.digit)).all()
    if inputs == "zero rows":
        assert y[::2].count_nonzero() == 0


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_error_on_average_is_that_of_uniform_rounding(engine: Engine) -> None:
    """Digits miss by up to a / (4 D^2), evenly spread: standard deviation a / (4 sqrt(3) D^2) per input, so
    a s ||q|| / (4 sqrt(3) D^2) per output. 20% of slack: the mean of 6,400 squares has a deviation of 2%."""
    torch.manual_seed(1)
    qweight, scale = torch.randint(-127, 128, (200, 1040), dtype=torch.int8), torch.rand(200) + 0.5
    x = torch.randn(32, 1040)
    y = two_digit_product(x, engine.pack(qweight, scale), engine)
    error = y - x.double() @ qweight.double().t() * scale.double()
    deviation = x.abs().amax(-1, keepdim=True) * scale * qweight.double().norm(dim=-1) / (48**0.5 * engine.digit**2)
    assert (error / deviation).square().mean().sqrt().item() < 1.2


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize(("columns", "out"), [(64, 64), (1000, 300), (513, 7), (96, 768)])
def test_a_row_does_not_depend_on_the_others(engine: Engine, columns: int, out: int) -> None:
    torch.manual_seed(2)
    packed = engine.pack(torch.randint(-127, 128, (out, columns), dtype=torch.int8), torch.rand(out))
    x = torch.randn(16, columns) * torch.logspace(-3, 3, 16)[:, None]
    together = two_digit_product(x, packed, engine)
    alone = torch.cat([two_digit_product(x[i : i + 1], packed, engine) for i in range(16)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_input_shows_in_its_row_only(engine: Engine, value: float) -> None:
    torch.manual_seed(3)
    packed = engine.pack(torch.randint(1, 128, (5, 40), dtype=torch.int8), torch.ones(5))
    x = torch.randn(3, 40)
    clean = two_digit_product(x, packed, engine)
    x[1, 7] = value
    y = two_digit_product(x, packed, engine)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@needs_engine
def test_packing_leaves_the_global_engine_alone() -> None:
    before = torch.backends.quantized.engine
    ENGINES[0].pack(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize(
    "limits",
    [
        {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"ATEN_CPU_CAPABILITY": "default"},
    ],
    ids=["avx2", "avx512 without vnni", "no vectors in torch"],
)
def test_right_on_lesser_processors(limits: dict[str, str]) -> None:
    """Processors without VNNI, imitated: what is chosen there must multiply full-range inputs correctly."""
    program = """
import torch
torch.set_num_threads(1)
from kernels import cpu_linear
from kernels.cpu import CpuOps
from kernels.cpu_engines import digit_bound
from kernels.weights import Int8Weight
cpu_linear.SMALL = 0
ops = CpuOps(torch.device("cpu"))
for columns, out in ((1000, 64), (96, 33)):
    q = torch.full((out, columns), 127, dtype=torch.int8)
    q[1::2] = -127
    scale = torch.linspace(0.01, 1, out)
    prepared = ops.prepare_linear(Int8Weight(q, scale))
    for x in (torch.ones(3, columns), -torch.ones(3, columns), torch.randn(3, columns)):
        exact = x.double() @ q.double().t() * scale.double()
        assert ((ops.linear(x, prepared) - exact).abs() <= digit_bound(x, q, scale, 63)).all(), ops.linear_reason
print(ops.linear_method)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **limits},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"fbgemm", "onednn", "widened"}
