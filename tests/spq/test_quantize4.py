from __future__ import annotations

import pytest
import torch

from kernels.weights import Int4Weight
from spq.errors import OptionError
from spq.quantize4 import MIN_SCALE, fit_grid, quantize4, quantize4_streamed

HALF = 2.0**-11  # relative rounding of float16


def matrix(shape: tuple[int, int], seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen) * scale * torch.rand((shape[0], 1), generator=gen)


def spread(weight: Int4Weight, part: torch.Tensor) -> torch.Tensor:
    return part.float().repeat_interleave(weight.group, dim=1)[:, : weight.in_features]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(64, 16), (70, 16), (65, 16), (7, 128), (1, 2), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_half_a_step(symmetric: bool, columns: int, group: int, dtype: torch.dtype) -> None:
    weight = matrix((9, columns)).to(dtype)
    packed = quantize4(weight, group, symmetric)
    groups = -(-columns // group)
    assert packed.shape == (9, columns) and packed.scale.dtype is torch.float16 and packed.scale.shape == (9, groups)
    assert packed.qweight.shape == (9, -(-columns // 2))
    assert (packed.zero is None) is symmetric
    step = spread(packed, packed.scale)
    # half a step; what float16 took from the scale (of a subnormal an absolute amount) times 8; the zero point costs
    # the ends another half
    slack = 8 * HALF + (0.0 if symmetric else 0.5)
    error = (packed.dequantize() - weight.float()).abs()
    assert bool((error <= step * (0.5 + slack) + 8 * MIN_SCALE).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_the_nearest_for_the_stored_scale(symmetric: bool) -> None:
    weight = matrix((8, 48), scale=1.0)
    packed = quantize4(weight, 16, symmetric)
    step, q = spread(packed, packed.scale), packed.integers().float()
    zero = 8 if packed.zero is None else spread(packed, packed.zero)
    here = (q * step - weight).abs()
    for other in (q - 1, q + 1):
        possible = ((other + zero) >= 0) & ((other + zero) <= 15)
        assert bool((here <= (other * step - weight).abs() + 1e-6)[possible].all())


def test_grids_by_hand() -> None:
    weight = torch.tensor([[-3.75, 1.0, 3.75, 0.5], [0.0, 15.0, 1.0, 7.0], [-15.0, -1.0, 0.0, -2.0]])
    even = quantize4(weight, 4, True)
    assert even.scale.flatten().tolist() == [0.5, 2.0, 2.0]
    # -7.5 -> -8 and 7.5 -> 8, which the grid ends before; ties go to the even integer
    assert even.integers().tolist() == [[-8, 2, 7, 1], [0, 7, 0, 4], [-8, 0, 0, -1]]
    uneven = quantize4(weight, 4, False)
    assert uneven.scale.flatten().tolist() == [0.5, 1.0, 1.0]
    assert uneven.zero is not None and uneven.zero.flatten().tolist() == [8, 0, 15]
    assert torch.equal(uneven.dequantize()[1:], weight[1:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.0123291015625, -0.75, 60000.0, -3.0])
def test_constant_groups_are_exact(symmetric: bool, search: bool, value: float) -> None:
    weight = torch.full((3, 20), value)
    weight[1] = 0.0
    weight[2, :8] = torch.arange(8.0)
    packed = quantize4(weight, 8, symmetric, search=search)
    assert float(packed.scale.min()) > 0
    expected = weight.half().float()
    assert torch.equal(packed.dequantize()[:2], expected[:2])
    assert torch.equal(packed.dequantize()[2, 8:], expected[2, 8:])


def test_tiny_weights_are_not_lost() -> None:
    weight = matrix((4, 32), scale=1e-5)
    packed = quantize4(weight, 16, True)
    assert (packed.dequantize() - weight).abs().max() < weight.abs().max() / 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [1e6, float("inf"), float("nan")])
def test_scale_beyond_float16_is_refused(symmetric: bool, bad: float) -> None:
    weight = matrix((4, 32))
    weight[2, 5] = bad
    with pytest.raises(OptionError, match="8 bits"):
        quantize4(weight, 16, symmetric)


@pytest.mark.parametrize("group", [0, -2, 3, 127])
def test_odd_group_is_refused(group: int) -> None:
    with pytest.raises(OptionError, match="even"):
        quantize4(matrix((4, 32)), group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 58])
def test_search_is_never_worse_in_its_own_measure(symmetric: bool, columns: int) -> None:
    gen = torch.Generator().manual_seed(2)
    weight = torch.randn((40, columns), generator=gen) ** 3  # heavy tails: clipping pays
    importance = torch.rand(columns, generator=gen, dtype=torch.float64) ** 4

    def error(packed: Int4Weight, share: torch.Tensor) -> torch.Tensor:
        return ((packed.dequantize() - weight).double() ** 2 * share).sum(dim=1)

    plain = quantize4(weight, 16, symmetric)
    for share in (importance, torch.ones(columns, dtype=torch.float64)):
        found = quantize4(weight, 16, symmetric, search=True, importance=share)
        assert bool((error(found, share) <= error(plain, share) * (1 + 1e-5)).all())
        assert float(error(found, share).sum()) < 0.95 * float(error(plain, share).sum())
    unweighted = quantize4(weight, 16, symmetric, search=True)
    weighted = quantize4(weight, 16, symmetric, search=True, importance=importance)
    assert float(error(weighted, importance).sum()) < float(error(unweighted, importance).sum())


def test_unimportant_inputs_leave_the_grid_alone() -> None:
    weight = matrix((4, 32))
    dead = quantize4(weight, 16, True, search=True, importance=torch.zeros(32))
    assert torch.equal(dead.scale, quantize4(weight, 16, True).scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_may_come_in_pieces(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = matrix((10, 36)), torch.ones(10)
    whole = quantize4(weight, 16, symmetric, search=True, bias=bias)
    monkeypatch.setattr("spq.quantize4.CHUNK_ELEMENTS", 3 * 36)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return weight[start:stop]

    pieces = quantize4_streamed(read, weight.shape, 16, symmetric, search=True, bias=bias)
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 10)] and pieces.bias is bias
    assert torch.equal(pieces.qweight, whole.qweight) and torch.equal(pieces.scale, whole.scale)
    assert (pieces.zero is None and whole.zero is None) or torch.equal(pieces.zero, whole.zero)  # type: ignore[arg-type]


def test_rounding_on_the_grid_is_a_projection() -> None:
    weight = matrix((6, 40), scale=1.0)
    for symmetric in (True, False):
        grid = fit_grid(weight, 16, symmetric)
        packed = quantize4(weight, 16, symmetric)
        assert torch.equal(grid.round(packed.dequantize()), grid.round(weight))
