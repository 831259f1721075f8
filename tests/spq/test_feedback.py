"""GPTQ: never worse than rounding to nearest on the inputs it was given, and nothing else about the format changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import spq.feedback
from kernels.weights import Int4Weight, Int8Weight
from spq.errors import CalibrationError, OptionError
from spq.feedback import feedback_int4, feedback_int8
from spq.quantize import quantize
from spq.quantize4 import Grid, fit_grid, quantize4
from tests.spq.correlated import inputs, matrix, moment, output_errors

Pair = tuple[Callable[..., Int4Weight | Int8Weight], Callable[[torch.Tensor], Int4Weight | Int8Weight]]
KINDS: dict[str, Pair] = {
    "int8": (feedback_int8, lambda w: quantize(w, True)),
    "int4": (lambda w, s, **k: feedback_int4(w, s, 16, True, **k), lambda w: quantize4(w, 16, True)),
    "int4_zero": (lambda w, s, **k: feedback_int4(w, s, 16, False, **k), lambda w: quantize4(w, 16, False)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Pair:
    return KINDS[request.param]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("shape", [(24, 48), (10, 150), (64, 37)])
@pytest.mark.parametrize("tokens", [400, 20])  # 20: the moment is singular
def test_no_row_is_worse_than_nearest(kind: Pair, order: bool, shape: tuple[int, int], tokens: int) -> None:
    feedback, nearest = kind
    weight, second = matrix(shape), moment(inputs(tokens, shape[1]))
    found = output_errors(feedback(weight, second, order=order).dequantize() - weight, second)
    plain = output_errors(nearest(weight).dequantize() - weight, second)
    assert bool((found <= plain * (1 + 1e-5)).all())
    assert float(found.sum()) < 0.8 * float(plain.sum())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uncorrelated_inputs_give_round_to_nearest(kind: Pair, order: bool, dtype: torch.dtype) -> None:
    feedback, nearest = kind
    weight, bias = matrix((12, 150)).to(dtype), torch.ones(12)
    sizes = torch.rand(150, generator=torch.Generator().manual_seed(7)) + 0.5
    for second in (torch.eye(150), torch.diag(sizes), torch.zeros((150, 150))):
        found, plain = feedback(weight, second, order=order, bias=bias), nearest(weight)
        assert torch.equal(found.qweight, plain.qweight) and torch.equal(found.scale, plain.scale)
        assert found.bias is bias


def by_the_book(weight: torch.Tensor, second: torch.Tensor, columns: list[int], rounded: Callable[..., torch.Tensor]):
    """OBQ's step (GPTQ, equation 2) with H_F^-1 of the columns still free inverted anew at every column."""
    work, n = weight.double().clone(), len(columns)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    for done, column in enumerate(columns):
        free = columns[done:]
        inverse = torch.linalg.inv(damped[free][:, free])
        values = rounded(column, work)
        work[:, free[1:]] -= ((work[:, column] - values) / inverse[0, 0])[:, None] * inverse[0, 1:]
        work[:, column] = values
    return work


@pytest.mark.parametrize("order", [False, True])
def test_int8_is_the_published_step(order: bool) -> None:
    weight, second = matrix((16, 150)), moment(inputs(400, 150))
    scale = quantize(weight, True).scale.double()
    columns = second.diagonal().argsort(descending=True).tolist() if order else list(range(150))
    expected = by_the_book(
        weight, second, columns, lambda k, work: (work[:, k] / scale).round().clamp(-127, 127) * scale
    )
    found = feedback_int8(weight, second, order=order)
    helped = (found.qweight != quantize(weight, True).qweight).any(dim=1)
    assert int(helped.sum()) == 16
    torch.testing.assert_close(found.dequantize().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 128, 160])
def test_int4_fits_each_grid_to_what_is_left(symmetric: bool, group: int) -> None:
    weight, second = matrix((16, 150)), moment(inputs(400, 150))
    fitted: dict[int, Grid] = {}

    def rounded(column: int, work: torch.Tensor) -> torch.Tensor:
        number, inside = divmod(column, group)
        if inside == 0:
            fitted[number] = fit_grid(work[:, column : column + group], group, symmetric)
        grid = fitted[number]
        scale, zero = grid.scale[:, 0].double(), grid.zero[:, 0].double()
        return ((work[:, column] / scale).round().add(zero).clamp(0, 15) - zero) * scale

    expected = by_the_book(weight, second, list(range(150)), rounded)
    found, nearest = feedback_int4(weight, second, group, symmetric).dequantize(), quantize4(weight, group, symmetric)
    worse = output_errors(expected - weight, second) >= output_errors(nearest.dequantize() - weight, second)
    assert int(worse.sum()) <= 1  # the published step is greedy; such a row is rounded to nearest
    expected[worse] = nearest.dequantize()[worse].double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_order_keeps_the_grids_of_the_weights_as_they_were() -> None:
    weight, second = matrix((16, 64)), moment(inputs(400, 64))
    for symmetric in (True, False):
        found, plain = feedback_int4(weight, second, 16, symmetric, order=True), quantize4(weight, 16, symmetric)
        assert torch.equal(found.scale, plain.scale) and not torch.equal(found.qweight, plain.qweight)
        assert (found.zero is None and plain.zero is None) or torch.equal(found.zero, plain.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_uses_the_inputs(symmetric: bool) -> None:
    weight, second = matrix((40, 64)) ** 3, moment(inputs(400, 64))
    errors = [
        float(output_errors(feedback_int4(weight, second, 16, symmetric, search=s).dequantize() - weight, second).sum())
        for s in (False, True)
    ]
    assert errors[1] < errors[0]
    plain = quantize4(weight, 16, symmetric, search=True, importance=second.diagonal())
    found = feedback_int4(weight, second, 16, symmetric, search=True)
    limit = output_errors(plain.dequantize() - weight, second)
    assert bool((output_errors(found.dequantize() - weight, second) <= limit * (1 + 1e-5)).all())


@pytest.mark.parametrize("order", [False, True])
def test_dead_inputs_are_rounded_to_nearest(order: bool) -> None:
    weight, x = matrix((12, 40)), inputs(300, 40)
    dead = [0, 17, 39]
    alive = [k for k in range(40) if k not in dead]
    x[:, dead] = 0.0
    found = feedback_int8(weight, moment(x), order=order)
    plain = quantize(weight, True)
    assert torch.equal(found.qweight[:, dead], plain.qweight[:, dead])
    assert not torch.equal(found.qweight[:, alive], plain.qweight[:, alive])
    for symmetric in (True, False):
        packed = feedback_int4(weight, moment(x), 8, symmetric, order=True)  # static grids: as round to nearest
        nearest = quantize4(weight, 8, symmetric).dequantize()
        assert torch.equal(packed.dequantize()[:, dead], nearest[:, dead])


def test_int8_stays_near_the_weight() -> None:
    """Feedback moves a weight by rounding errors of others, not freely: a few steps on realistic inputs."""
    weight, second = matrix((32, 128)), moment(inputs(1000, 128))
    found, plain = feedback_int8(weight, second), quantize(weight, True)
    moved = (found.qweight.int() - plain.qweight.int()).abs()
    assert float(moved.float().mean()) < 1.0 and 0 < int(moved.max()) <= 12
    mild = torch.eye(128, dtype=torch.float64) + 0.1  # evenly correlated inputs
    assert int((feedback_int8(weight, mild).qweight.int() - plain.qweight.int()).abs().max()) == 1


def test_one_scale_per_matrix() -> None:
    weight, second = matrix((12, 40)), moment(inputs(300, 40))
    found = feedback_int8(weight, second, per_channel=False)
    assert torch.equal(found.scale, quantize(weight, False).scale)
    limit = output_errors(quantize(weight, False).dequantize() - weight, second)
    assert float(output_errors(found.dequantize() - weight, second).sum()) < 0.8 * float(limit.sum())


def test_large_matrices_in_float32_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = matrix((48, 160)), moment(inputs(1000, 160))
    errors = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(spq.feedback, "WIDE_ELEMENTS", limit)
        errors.append([
            float(output_errors(made.dequantize() - weight, second).sum())
            for made in (feedback_int8(weight, second), feedback_int4(weight, second, 32))
        ])  # fmt: skip
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # integers differ where a rounding was close


def test_degenerate_matrices() -> None:
    second = moment(inputs(300, 40))
    for weight in (torch.zeros((6, 40)), torch.full((6, 40), 0.5), torch.outer(torch.arange(6.0), torch.ones(40))):
        for made in (feedback_int8(weight, second), feedback_int4(weight, second, 16)):
            assert torch.isfinite(made.dequantize()).all()
        if not weight.any():
            assert not made.dequantize().any()
    single = feedback_int4(torch.ones((3, 1)), torch.ones((1, 1)))
    assert torch.equal(single.dequantize(), torch.ones((3, 1)))


def test_bad_moments_are_refused() -> None:
    weight = matrix((4, 6))
    for make in (feedback_int8, feedback_int4):
        bad = torch.eye(6)
        bad[1, 1] = float("inf")
        with pytest.raises(CalibrationError, match="not finite"):
            make(weight, bad)
        wrong = torch.eye(6) * 0.1
        wrong[0, 1] = wrong[1, 0] = 5.0
        with pytest.raises(CalibrationError, match="negative"):
            make(weight, wrong)
    with pytest.raises(OptionError, match="even"):
        feedback_int4(weight, torch.eye(6), 3)


def test_damping_grows_where_it_must() -> None:
    """A moment a little off positive definite, as float32 sums leave it, is no reason to fail."""
    weight, second = matrix((8, 6)), torch.eye(6, dtype=torch.float64)
    second[0, 1] = second[1, 0] = 1.05
    made = feedback_int8(weight, second, damping=0.0)
    assert (made.dequantize() - weight).abs().max() < 10 * float(made.scale.max())
