"""Packed int4 products against exact ones: odd shapes and groups, zero points, extremes, gate and up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.native.int4 import MOST_LEVELS, int4_bound, int4_matrix, levels_for
from kernels.native.library import Pool
from kernels.ops import Norm
from kernels.weights import Int4Weight, pack_int4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def int4(rows: int, columns: int, group: int, zeros: bool = False) -> Int4Weight:
    groups = -(-columns // group)
    zero = torch.randint(0, 16, (rows, groups), dtype=torch.uint8) if zeros else None
    scale = ((torch.rand(rows, groups) + 0.2) / columns**0.5).half()
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    return Int4Weight(pack_int4(q), scale, zero, group, columns)


def assert_exact(got: Tensor, x: Tensor, weight: Int4Weight) -> None:
    """A float16 scale times an integer below 16 is exact in float32, so `dequantize` is the exact matrix."""
    exact = x.double() @ weight.dequantize().double().t()
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= int4_bound(x, weight)).all()


SHAPES = [(1, 1, 2), (15, 2, 2), (16, 31, 32), (17, 33, 6), (130, 96, 32), (33, 700, 128), (20, 130, 128), (9, 64, 2)]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 13, 193])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_products(pool: Pool, rows: int, outputs: int, inputs: int, group: int) -> None:
    x = torch.randn(rows, inputs)
    for zeros in (False, True):
        weight = int4(outputs, inputs, group, zeros)
        assert_exact(int4_matrix([weight], pool).multiply(x), x, weight)


def test_each_half_is_where_it_belongs(pool: Pool) -> None:
    """A unit vector reads one column."""
    weight = int4(37, 23, 10, zeros=True)
    got = int4_matrix([weight], pool).multiply(torch.eye(23))
    torch.testing.assert_close(got, weight.dequantize().t(), rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("inputs", [700, 5000, 40_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_full_range_stay_in_32_bits(pool: Pool, inputs: int, sign: int) -> None:
    """One group of all inputs, whether what is large is q or the zero point."""
    q = torch.full((18, inputs), 15, dtype=torch.uint8)
    zero = torch.zeros(18, 1, dtype=torch.uint8)
    q[1::2], zero[1::2] = 0, 15
    weight = Int4Weight(pack_int4(q), torch.ones(18, 1).half(), zero, inputs, inputs)
    matrix = int4_matrix([weight], pool)
    assert matrix.levels * 15 * inputs < 2**31
    assert matrix.levels == MOST_LEVELS or inputs > 4000
    x = torch.full((2, inputs), float(sign))
    assert_exact(matrix.multiply(x), x, weight)


def test_a_group_of_usual_size_costs_no_levels() -> None:
    assert levels_for(128) == levels_for(4096) == MOST_LEVELS
    assert levels_for(11008) > 13_000


def test_rows_may_be_strided_and_huge_or_tiny(pool: Pool) -> None:
    weight = int4(40, 64, 32, zeros=True)
    matrix = int4_matrix([weight], pool)
    x = torch.randn(9, 200)[:, 70:134] * torch.logspace(-20, 20, 9)[:, None]
    x[3] = 0
    assert_exact(matrix.multiply(x), x, weight)
    assert (matrix.multiply(x)[3] == 0).all()


def test_a_row_does_not_depend_on_the_others(pool: Pool) -> None:
    matrix = int4_matrix([int4(300, 257, 64, zeros=True)], pool)
    norm = Norm(torch.rand(257), 1e-5)
    x = torch.randn(200, 257)
    whole = matrix.multiply(x, norm)
    for i in range(0, 200, 7):
        assert torch.equal(matrix.multiply(x[i : i + 1], norm)[0], whole[i])
    assert torch.equal(matrix.multiply(x[50:61], norm), whole[50:61])
    pool.limit(1)
    alone = matrix.multiply(x, norm)
    pool.limit(2)
    assert torch.equal(alone, whole)


def test_the_product_can_be_added_to_rows_apart(pool: Pool) -> None:
    matrix = int4_matrix([int4(50, 66, 32)], pool)
    x, wide = torch.randn(7, 66), torch.randn(7, 90)
    before, h = wide.clone(), wide[:, 20:70]
    expected = h + matrix.multiply(x)
    assert matrix.add_product(h, x) is h
    torch.testing.assert_close(h, expected, rtol=2.0**-22, atol=0)
    assert torch.equal(wide[:, :20], before[:, :20]) and torch.equal(wide[:, 70:], before[:, 70:])


@pytest.mark.parametrize("width", [1, 16, 77])
@pytest.mark.parametrize("zeros", [(False, False), (True, False)])
def test_gate_and_up(pool: Pool, width: int, zeros: tuple[bool, bool]) -> None:
    gate, up = (int4(width, 130, 32, z) for z in zeros)
    x, norm = torch.randn(9, 130) * 100, Norm(torch.ones(130), 1e-6)
    g, u = (int4_matrix([w], pool).multiply(x, norm).double() for w in (gate, up))
    expected = torch.nn.functional.silu(g) * u
    got = int4_matrix([gate, up], pool, alternate=True).gate_up_silu(x, norm)
    # e^x is good to 2e-7, and six float32 operations follow
    assert ((got - expected).abs() <= 1e-6 * (g * u).abs() + 1e-30).all()


def test_stacked_parts_are_those_alone(pool: Pool) -> None:
    """Bit for bit, with zero points in one, float32 scales in another, and blocks that two of them share."""
    parts = [int4(20, 70, 32), int4(7, 70, 32, zeros=True), int4(16, 70, 32)]
    parts[2].scale = parts[2].scale.float() * 2.0**-9
    x = torch.randn(5, 70)
    got = int4_matrix(parts, pool).multiply(x)
    alone = [int4_matrix([part], pool).multiply(x) for part in parts]
    assert torch.equal(got, torch.cat(alone, -1))
    assert_exact(alone[2], x, parts[2])
    with pytest.raises(ValueError, match="cannot be stacked"):
        int4_matrix([parts[0], int4(20, 70, 64)], pool)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(pool: Pool, bad: float) -> None:
    matrix = int4_matrix([int4(20, 40, 32)], pool)
    x = torch.randn(3, 40)
    clean = matrix.multiply(x)
    x[1, 17] = bad
    got = matrix.multiply(x)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_rows_of_the_table(pool: Pool, scale_dtype: torch.dtype) -> None:
    weight = int4(50, 33, 10, zeros=True)
    weight.scale = weight.scale.to(scale_dtype)
    ids = torch.tensor([0, 49, 16, 15, 16, 24])
    torch.testing.assert_close(int4_matrix([weight], pool).rows(ids), weight.dequantize()[ids], rtol=0, atol=0)


def test_half_a_byte_a_weight(pool: Pool) -> None:
    for zeros, per_group in ((False, 2), (True, 3)):
        matrix = int4_matrix([int4(64, 1024, 128, zeros)], pool)
        assert matrix.nbytes == 64 * (512 + 8 * per_group)
