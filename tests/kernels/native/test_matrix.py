"""Packed int8 products against exact ones: odd shapes, extremes, segments, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from kernels.native.int8 import choose_levels, int8_bound, int8_matrix
from kernels.native.library import Pool
from kernels.ops import Norm
from kernels.weights import Int8Weight


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def int8(rows: int, columns: int) -> Int8Weight:
    return Int8Weight(torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows) / columns)


def assert_exact(got: Tensor, x: Tensor, weight: Int8Weight, levels: int) -> None:
    exact = x.double() @ weight.dequantize().double().t()
    assert got.shape == exact.shape
    # dequantize rounds weights to float32 once
    slack = 2.0**-23 * (x.double().abs() @ weight.dequantize().double().abs().t())
    assert ((got - exact).abs() <= int8_bound(x, weight, levels) + slack).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 13, 193])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (15, 2), (16, 31), (17, 33), (130, 96), (33, 700)])
def test_products(pool: Pool, rows: int, outputs: int, inputs: int) -> None:
    weight = int8(outputs, inputs)
    matrix = int8_matrix([weight], pool)
    x = torch.randn(rows, inputs)
    assert_exact(matrix.multiply(x), x, weight, matrix.levels)


def test_rows_may_be_strided_and_huge_or_tiny(pool: Pool) -> None:
    weight = int8(40, 64)
    matrix = int8_matrix([weight], pool)
    x = torch.randn(9, 200)[:, 70:134] * torch.logspace(-20, 20, 9)[:, None]
    x[3] = 0
    assert_exact(matrix.multiply(x), x, weight, matrix.levels)
    assert (matrix.multiply(x)[3] == 0).all()


@pytest.mark.parametrize("inputs", [700, 5000, 40_000])
def test_sums_at_full_range_stay_in_32_bits(pool: Pool, inputs: int) -> None:
    weight = Int8Weight(torch.full((18, inputs), 127, dtype=torch.int8), torch.ones(18))
    weight.qweight[1::2] = -127
    matrix = int8_matrix([weight], pool)
    assert matrix.levels >= 16384
    x = torch.ones(2, inputs)
    assert_exact(matrix.multiply(x), x, weight, matrix.levels)


def test_segments_are_cut_only_where_sums_would_overflow() -> None:
    small = torch.ones(3, 4096, dtype=torch.int8)
    assert choose_levels([small]) == (4096, 32767)
    large = torch.full((3, 4096), 127, dtype=torch.int8)
    segment, levels = choose_levels([small, large])
    assert segment < 4096 and levels >= 16384 and levels * 127 * segment < 2**31


def test_a_row_does_not_depend_on_the_others(pool: Pool) -> None:
    matrix = int8_matrix([int8(300, 257)], pool)
    norm = Norm(torch.rand(257), 1e-5)
    x = torch.randn(200, 257)
    whole = matrix.multiply(x, norm)
    for i in range(0, 200, 7):
        assert torch.equal(matrix.multiply(x[i : i + 1], norm)[0], whole[i])
    assert torch.equal(matrix.multiply(x[50:61], norm), whole[50:61])


def test_norm_comes_before_the_product(pool: Pool) -> None:
    weight, norm = int8(70, 90), Norm(torch.randn(90), 1e-5)
    matrix = int8_matrix([weight], pool)
    x = torch.randn(8, 90) * 30
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
    exact = normed @ weight.dequantize().double().t()
    bound = int8_bound(normed.float(), weight)
    rounding = 2.0**-20 * (normed.abs() @ weight.dequantize().double().abs().t())
    assert ((matrix.multiply(x, norm) - exact).abs() <= bound + rounding).all()


def test_the_product_can_be_added(pool: Pool) -> None:
    weight = int8(50, 64)
    matrix = int8_matrix([weight], pool)
    x, h = torch.randn(7, 64), torch.randn(7, 50)
    expected = h + matrix.multiply(x)
    assert matrix.add_product(h, x) is h
    torch.testing.assert_close(h, expected, rtol=2.0**-22, atol=0)
    with pytest.raises(ValueError, match="cannot take a product"):
        matrix.add_product(h[:3], x)


@pytest.mark.parametrize("width", [1, 16, 77])
def test_gate_and_up(pool: Pool, width: int) -> None:
    gate, up = int8(width, 130), int8(width, 130)
    matrix = int8_matrix([gate, up], pool, alternate=True)
    x, norm = torch.randn(9, 130) * 100, Norm(torch.ones(130), 1e-6)
    parts = [int8_matrix([w], pool) for w in (gate, up)]
    for part in parts:
        assert part.levels == matrix.levels or width == 1
    g, u = (part.multiply(x, norm).double() for part in parts)
    expected = torch.nn.functional.silu(g) * u
    scale = (g.abs() * u.abs() + 1.1 * g.abs() * u.abs()).clamp_min(1e-30)
    assert ((matrix.gate_up_silu(x, norm) - expected).abs() <= 2e-4 * scale + 1e-6 * u.abs() + 1e-9).all()


def test_silu_of_extremes(pool: Pool) -> None:
    one = Int8Weight(torch.tensor([[127, 0]], dtype=torch.int8), torch.tensor([1 / 127]))
    other = Int8Weight(torch.tensor([[0, 127]], dtype=torch.int8), torch.tensor([1 / 127]))
    matrix = int8_matrix([one, other], pool, alternate=True)
    # a norm of one large and one unit entry: gate runs over the exponent's whole range
    for gate in (-1e4, -100.0, -88.0, -1.0, 0.0, 1.0, 88.0, 1e4):
        x = torch.tensor([[gate, 1.0]])
        root = float((x.double().square().mean() + 1e-5).sqrt())
        norm = Norm(torch.tensor([root, root]), 1e-5)
        exact = float(torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64)))
        got = float(matrix.gate_up_silu(x, norm))
        assert abs(got - exact) <= max(abs(gate), 1) * max(abs(gate), 1) / matrix.levels + 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(pool: Pool, bad: float) -> None:
    matrix = int8_matrix([int8(20, 40)], pool)
    x = torch.randn(3, 40)
    clean = matrix.multiply(x)
    x[1, 17] = bad
    got = matrix.multiply(x)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], clean[::2])


def test_rows_of_the_table(pool: Pool) -> None:
    weight = int8(50, 33)
    matrix = int8_matrix([weight], pool)
    ids = torch.tensor([0, 49, 16, 15, 16])
    torch.testing.assert_close(matrix.rows(ids), weight.dequantize()[ids], rtol=0, atol=0)
    assert matrix.rows(ids[:0]).shape == (0, 33)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="50 rows"):
            matrix.rows(torch.tensor([wrong]))


def test_wrong_inputs_are_refused(pool: Pool) -> None:
    matrix = int8_matrix([int8(4, 8)], pool)
    for x in (torch.ones(1, 7), torch.ones(1, 8, dtype=torch.float64), torch.ones(8, 2).t()[:, ::1]):
        with pytest.raises(ValueError, match="float32 rows of 8"):
            matrix.multiply(x)


def test_threads_share_jobs_without_losing_or_repeating_a_task(pool: Pool) -> None:
    """Many short jobs while other threads keep the cores busy: workers come late, and must not touch the next job."""
    wide = Pool(pool.library, 7)
    weight = int8(900, 256)
    matrix, alone = int8_matrix([weight], wide), int8_matrix([weight], Pool(pool.library, 1))
    inputs = [torch.randn(rows, 256) for rows in (1, 3, 8, 40)]
    expected = [alone.multiply(x) for x in inputs]
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    burners = [threading.Thread(target=burn) for _ in range(2)]
    for burner in burners:
        burner.start()
    try:
        for round_ in range(400):
            x, want = inputs[round_ % 4], expected[round_ % 4]
            h = torch.zeros(want.shape)
            matrix.add_product(h, x)  # a repeated task would add twice
            assert torch.equal(h, want)
    finally:
        stop.set()
        for burner in burners:
            burner.join()
    wide.limit(1)
    assert torch.equal(matrix.multiply(inputs[0]), expected[0])
