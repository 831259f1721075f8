"""Activation-whitened SVD: what is dropped is the output error, whatever the inputs and the matrix look like."""

from __future__ import annotations

import pytest
import torch

from spq.config import SigmaPlacement
from spq.errors import CalibrationError, OptionError
from spq.svd import decompose, residual_factors
from spq.whiten import checked, damped, square_root
from tests.spq.correlated import inputs, matrix, moment, output_errors

SHAPES = [(24, 24), (12, 40), (40, 12)]
SIGMAS: tuple[SigmaPlacement, ...] = ("down", "up", "split")


def output_error(difference: torch.Tensor, second: torch.Tensor) -> float:
    return float(output_errors(difference, second).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_dropped_energy_is_the_output_error(shape: tuple[int, int], rank: int, sigma: SigmaPlacement) -> None:
    x, weight = inputs(200, shape[1]), matrix(shape)
    spectrum = decompose(weight, moment(x))
    down, up = spectrum.factors(rank, sigma)
    difference = weight - up @ down
    lost = float(spectrum.energy[rank:].sum())
    assert output_error(difference, moment(x)) == pytest.approx(lost, rel=1e-5)
    assert float((x @ difference.double().T).square().sum() / len(x)) == pytest.approx(lost, rel=1e-5)
    assert float(spectrum.energy.sum()) == pytest.approx(output_error(weight, moment(x)), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_pair_of_the_rank_is_better(shape: tuple[int, int]) -> None:
    x, weight = inputs(200, shape[1]), matrix(shape)
    plain = decompose(weight).factors(6, "down")
    spectrum = decompose(weight, moment(x))
    assert output_error(weight - plain[1] @ plain[0], moment(x)) > 1.05 * float(spectrum.energy[6:].sum())
    singular = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(moment(x)))
    torch.testing.assert_close(spectrum.energy.sqrt(), singular, rtol=1e-6, atol=1e-6 * float(singular[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 8])  # 8: fewer than channels, the moment is singular
@pytest.mark.parametrize("sigma", SIGMAS)
def test_full_rank_pair_is_the_matrix(shape: tuple[int, int], tokens: int, sigma: SigmaPlacement) -> None:
    weight = matrix(shape)
    down, up = decompose(weight, moment(inputs(tokens, shape[1]))).factors(min(shape), sigma)
    assert (up @ down - weight).abs().max() < 40 * torch.finfo(torch.float32).eps * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_moment_is_the_plain_svd(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    for second in (torch.eye(shape[1]), torch.ones(shape[1]), torch.zeros((shape[1], shape[1]))):
        spectrum = decompose(weight, second)
        if second.any():
            torch.testing.assert_close(spectrum.energy, decompose(weight).energy, rtol=1e-9, atol=1e-9)
        if second.any() or shape[0] > shape[1]:  # with no inputs at all and out <= in every pair is as good
            down, up = spectrum.factors(4, "down")
            plain = decompose(weight).factors(4, "down")
            torch.testing.assert_close(up @ down, plain[1] @ plain[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_may_be_given_alone(shape: tuple[int, int]) -> None:
    weight, diagonal = matrix(shape), torch.rand(shape[1], generator=torch.Generator().manual_seed(3)) + 0.1
    diagonal[2] = 0.0
    short, long = decompose(weight, diagonal), decompose(weight, torch.diag(diagonal))
    torch.testing.assert_close(short.energy, long.energy, rtol=1e-9, atol=1e-9)
    products = [up @ down for down, up in (short.factors(5, "down"), long.factors(5, "down"))]
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_dead_inputs(shape: tuple[int, int], sigma: SigmaPlacement) -> None:
    """Zero rows and columns: the rest is approximated as if they were not there, and nothing blows up."""
    weight, x = matrix(shape), inputs(200, shape[1])
    dead = [0, 3, shape[1] - 1]
    x[:, dead] = 0.0
    alive = [i for i in range(shape[1]) if i not in dead]
    rank = 6
    down, up = decompose(weight, moment(x)).factors(rank, sigma)
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    rest = decompose(weight[:, alive], moment(x[:, alive]))
    error, best = output_error(weight - up @ down, moment(x)), float(rest.energy[rank:].sum())
    # the fallback's damping, 1e-6 of the mean diagonal, is all that may be lost
    assert error <= best * (1 + 1e-4) + 1e-5 * float(moment(x).diagonal().mean()) * float(weight.norm()) ** 2
    assert float((up @ down).abs().max()) < 10 * float(weight.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_weights(shape: tuple[int, int], sigma: SigmaPlacement, dtype: torch.dtype) -> None:
    second = moment(inputs(200, shape[1]))
    gen = torch.Generator().manual_seed(5)
    left, right = torch.randint(-4, 5, (shape[0], 1), generator=gen), torch.randint(-4, 5, (1, shape[1]), generator=gen)
    one, zero = (left * right).to(dtype), torch.zeros(shape, dtype=dtype)
    for metric in (second, None):
        spectrum = decompose(one, metric)
        assert float(spectrum.energy[1:].sum()) <= 1e-12 * float(spectrum.energy[0])
        for rank in (1, 4):  # directions without energy change nothing
            down, up = spectrum.factors(rank, sigma)
            torch.testing.assert_close(up @ down, one.float(), rtol=0, atol=1e-4)
        down, up = decompose(zero, metric).factors(3, sigma)
        assert torch.isfinite(down).all() and torch.isfinite(up).all() and not (up @ down).any()


def test_root_and_its_fallbacks() -> None:
    good = moment(inputs(100, 10))
    rows = torch.randn((3, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lacking = moment(inputs(4, 10))  # rank 4
    # indefinite with a negative trace: the shift is too small, eigenvectors have to do
    hopeless = torch.diag(torch.tensor([1.0] + [-2.0] * 9, dtype=torch.float64))
    for second, triangular, exact in ((good, True, 1e-12), (lacking, True, 1e-5), (hopeless, False, None)):
        root = square_root(second)
        assert root.triangular is triangular
        if exact is not None:
            scale = float(second.diagonal().mean())
            torch.testing.assert_close(root.matrix @ root.matrix.T, second, rtol=0, atol=exact * scale)
        torch.testing.assert_close(root.undo(rows) @ root.matrix, rows, rtol=1e-6, atol=1e-6)
        back = root.matrix @ (root.matrix.T @ root.solve(rows.T))
        torch.testing.assert_close(back, rows.T, rtol=1e-6, atol=1e-6)
    assert torch.equal(square_root(torch.zeros((4, 4))).matrix.abs().sum(dim=0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(square_root(torch.zeros(4)).matrix, torch.eye(4, dtype=torch.float64))


def test_damping_adds_to_the_diagonal_only() -> None:
    second = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    assert torch.equal(damped(second, 0.1), torch.tensor([[1.2, 0.5], [0.5, 3.2]]).double().round(decimals=6))
    assert damped(second.diagonal(), 0.1).tolist() == pytest.approx([1.2, 3.2])
    assert torch.equal(second, torch.tensor([[1.0, 0.5], [0.5, 3.0]]))


def test_moment_that_is_not_finite_is_refused() -> None:
    second = torch.eye(4)
    second[1, 2] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        checked(second, torch.device("cpu"))
    with pytest.raises(CalibrationError, match="not finite"):
        decompose(torch.ones((3, 4)), second)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_residual_in_one_metric_is_one_svd(shape: tuple[int, int], share: float) -> None:
    weight, second = matrix(shape), moment(inputs(200, shape[1]))
    down, up = residual_factors(weight, None, 10, share)
    one = decompose(weight).factors(10, "down")
    assert down.shape == one[0].shape and up.shape == one[1].shape
    torch.testing.assert_close(up @ down, one[1] @ one[0], rtol=0, atol=1e-5)
    # the same in the whitened metric, stage by stage
    first = decompose(weight, second).factors(7, "down")
    rest = decompose(weight - first[1] @ first[0], second).factors(3, "down")
    whole = decompose(weight, second).factors(10, "down")
    torch.testing.assert_close(first[1] @ first[0] + rest[1] @ rest[0], whole[1] @ whole[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_of_mixed_metrics_lies_between(shape: tuple[int, int]) -> None:
    weight, second = matrix(shape), moment(inputs(200, shape[1]))
    down, up = residual_factors(weight, second, 10, 0.3)
    assert down.shape == (10, shape[1]) and up.shape == (shape[0], 10)
    mixed, plain, whitened = (
        weight - up @ down,
        *(weight - u @ d for d, u in (decompose(weight, s).factors(10, "down") for s in (None, second))),
    )
    assert output_error(whitened, second) * 1.001 < output_error(mixed, second)  # worse on these inputs
    assert mixed.norm() * 1.001 < whitened.norm()  # nearer to the matrix: what unseen inputs gain
    assert plain.norm() * 1.001 < mixed.norm()


def test_residual_refuses_what_means_nothing() -> None:
    weight = matrix((4, 6))
    for rank, share in ((2, -0.1), (2, 1.1), (0, 0.5), (5, 0.5)):
        with pytest.raises(OptionError):
            residual_factors(weight, None, rank, share)
