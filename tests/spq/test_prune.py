from __future__ import annotations

import math

import pytest
import torch

from spq.errors import CalibrationError
from spq.prune import (
    bias_compensation,
    dropping_errors,
    energy_scores,
    kept_neurons,
    kept_width,
    prune_ratios,
    refit_errors,
    refit_kept,
)
from spq.whiten import damped
from tests.spq.correlated import inputs, matrix, moment, output_errors


def test_ratios_by_hand() -> None:
    means = [1.0, math.e, math.e**2]
    low, middle, high = prune_ratios(means, 0.01, 0.05)
    assert low == pytest.approx(0.05, abs=1e-6)  # smallest activation: the maximum
    assert middle == pytest.approx(0.03, abs=1e-6)  # logarithmic: half way
    assert high == pytest.approx(0.01, abs=1e-9)


def test_equal_layers_lose_the_minimum() -> None:
    assert prune_ratios([0.5, 0.5], 0.0, 0.3) == [0.0, 0.0]


def test_dead_layer_does_not_break_the_logarithm() -> None:
    assert prune_ratios([0.0, 1.0], 0.0, 0.2) == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (11008, 0.05, 1, 10457),  # int(), not rounded: the published example
        (11008, 0.05, None, 10496),  # next multiple of 64
        (512, 0.05, None, 496),
        (172, 0.0, None, 172),  # no multiple of 8, never above the width
        (10, 0.99, 1, 1),
    ],
)
def test_kept_width(width: int, ratio: float, multiple: int | None, kept: int) -> None:
    assert kept_width(width, ratio, multiple) == kept


def test_kept_neurons_are_the_largest_in_order() -> None:
    assert kept_neurons(torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0]), 3).tolist() == [1, 3, 4]


def layer(width: int = 24, hidden: int = 10, tokens: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of down_proj float64 [tokens, width] with a mean, and its weight [hidden, width]."""
    x = inputs(tokens, width) + torch.linspace(-5, 5, width, dtype=torch.float64)
    return x, matrix((hidden, width))


def test_energy_score_is_the_cost_of_one_neuron() -> None:
    x, weight = layer()
    scores = energy_scores(moment(x).diagonal(), weight)
    for j in (0, 7, 23):
        alone = (x[:, j : j + 1] @ weight[:, j : j + 1].double().T).square().sum() / len(x)
        assert float(scores[j]) == pytest.approx(float(alone), rel=1e-9)


def test_dropping_errors_are_those_of_the_outputs() -> None:
    x, weight = layer()
    second = moment(x)
    order = energy_scores(second.diagonal(), weight).argsort(descending=True)
    errors = dropping_errors(second, weight, order)
    assert errors.shape == (25,) and float(errors[-1]) == 0.0
    for k in range(25):
        gone = order[k:]
        measured = (x[:, gone] @ weight[:, gone].double().T).square().sum() / len(x)
        assert float(errors[k]) == pytest.approx(float(measured), rel=1e-8, abs=1e-12)
    independent = dropping_errors(second.diagonal(), weight, order)
    assert float(independent[23]) == pytest.approx(float(errors[23]), rel=1e-9)  # one neuron has no partner
    torch.testing.assert_close(independent[:-1] - independent[1:], energy_scores(second.diagonal(), weight)[order])
    assert not torch.allclose(independent[:20], errors[:20], rtol=0.05)


def test_bias_takes_the_mean_off_the_error() -> None:
    x, weight = layer()
    mean, dropped = x.mean(dim=0), torch.tensor([1, 4, 20])
    bias = bias_compensation(mean, weight, dropped)
    assert bias.shape == (10,) and bias.dtype is torch.float32
    lost = x[:, dropped] @ weight[:, dropped].double().T
    before, after = (float(t.square().sum() / len(x)) for t in (lost, lost - bias.double()))
    assert before - after == pytest.approx(float(bias.double().square().sum()), rel=1e-5)
    covariance = moment(x) - torch.outer(mean, mean)
    order = torch.tensor([j for j in range(24) if j not in dropped] + dropped.tolist())
    assert float(dropping_errors(covariance, weight, order)[21]) == pytest.approx(after, rel=1e-5)


def test_refit_is_least_squares() -> None:
    x, weight = layer()
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 13, 14, 17, 21])
    found = refit_kept(weight, moment(x), kept, damping=0.0)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=1e-4)
    everything = torch.arange(24)
    torch.testing.assert_close(refit_kept(weight, moment(x), everything), weight)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_refit_errors_are_those_of_the_refit(damping: float) -> None:
    x, weight = layer()
    second = moment(x)
    order = energy_scores(second.diagonal(), weight).argsort(descending=True)
    predicted, dropping = refit_errors(second, weight, order, damping), dropping_errors(second, weight, order)
    metric = damped(second, damping)
    for k in range(1, 25):
        whole = torch.zeros_like(weight)
        whole[:, order[:k]] = refit_kept(weight, second, order[:k], damping)
        measured = float(output_errors(weight - whole, metric).sum())
        assert float(predicted[k]) == pytest.approx(measured, rel=1e-4, abs=1e-6)
        assert float(output_errors(weight - whole, second).sum()) <= float(dropping[k]) * (1 + 1e-6) + 1e-6
    assert float(predicted[12]) < 0.8 * float(dropping[12])


def test_refit_with_a_bias_needs_the_covariance() -> None:
    x, weight = layer()
    mean, kept = x.mean(dim=0), torch.arange(0, 24, 2)
    smaller = refit_kept(weight, moment(x) - torch.outer(mean, mean), kept, damping=0.0).double()
    bias = weight.double() @ mean - smaller @ mean[kept]  # as the docstring of bias_compensation says
    best = torch.linalg.lstsq(torch.cat((x[:, kept], torch.ones((len(x), 1)).double()), dim=1), x @ weight.double().T)
    torch.testing.assert_close(torch.cat((smaller, bias[:, None]), dim=1), best.solution.T, rtol=1e-4, atol=1e-3)


def test_copies_of_a_neuron_cost_nothing_when_refitted() -> None:
    x, weight = layer()
    x[:, 12:] = x[:, :12]  # every neuron twice: the moment is singular
    second, kept = moment(x), torch.arange(12)
    whole = torch.zeros_like(weight)
    whole[:, :12] = refit_kept(weight, second, kept, damping=1e-9)
    torch.testing.assert_close(whole[:, :12], weight[:, :12] + weight[:, 12:], rtol=1e-4, atol=1e-4)
    order = torch.arange(24)
    errors = refit_errors(second, weight, order, damping=1e-9)
    assert float(errors[12]) < 1e-6 * float(errors[0])


def test_dead_neurons_are_dropped_first_and_break_nothing() -> None:
    x, weight = layer()
    x[:, [3, 11]] = 0.0
    second = moment(x)
    scores = energy_scores(second.diagonal(), weight)
    assert kept_neurons(scores, 22).tolist() == [j for j in range(24) if j not in (3, 11)]
    order = scores.argsort(descending=True)
    assert float(dropping_errors(second, weight, order)[22]) == 0.0
    kept = torch.arange(12)  # neuron 3 among them: its column stays
    found = refit_kept(weight, second, kept)
    torch.testing.assert_close(found[:, 3], weight[:, 3])
    nothing = torch.zeros((24, 24))
    assert torch.equal(refit_kept(weight, nothing, kept), weight[:, :12])
    assert not refit_errors(nothing, weight, order).any()


def test_moment_that_is_not_finite_is_refused() -> None:
    _, weight = layer()
    bad = torch.full((24, 24), float("nan"))
    with pytest.raises(CalibrationError):
        dropping_errors(bad, weight, torch.arange(24))
    with pytest.raises(CalibrationError):
        refit_errors(bad, weight, torch.arange(24))
    with pytest.raises(CalibrationError):
        refit_kept(weight, bad, torch.arange(4))
