"""The correction takes away exactly the energy it kept, and with every rank the whole error."""

from __future__ import annotations

import pytest
import torch

from kernels.weights import CorrectedWeight, DenseWeight, Int8Weight, Leaf
from spq.correct import CorrectionMetric, error_spectrum, low_rank_correction
from spq.errors import CalibrationError, OptionError
from spq.feedback import feedback_int4
from spq.quantize4 import quantize4
from spq.whiten import damped
from tests.spq.correlated import inputs, matrix, moment, output_errors

SHAPES = [(24, 24), (12, 40), (40, 12)]
METRICS: tuple[CorrectionMetric, ...] = ("whitened", "diagonal")


def whole(factor: torch.Tensor) -> Leaf:
    return DenseWeight(factor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_error_falls_by_the_kept_energy(shape: tuple[int, int], metric: CorrectionMetric, damping: float) -> None:
    weight, second = matrix(shape), moment(inputs(300, shape[1]))
    stored = quantize4(weight, 8).dequantize()
    spectrum = error_spectrum(weight, stored, second, metric=metric, damping=damping)
    measure = damped(second if metric == "whitened" else torch.diag(second.diagonal()), damping)
    before = float(output_errors(weight - stored, measure).sum())
    assert float(spectrum.energy.sum()) == pytest.approx(before, rel=1e-9)
    for rank in (1, 5):
        made = low_rank_correction(spectrum, rank, store=whole)
        assert made.rank == rank and made.shape == shape and made.bias is None
        after = float(output_errors(weight - stored - made.dequantize(), measure).sum())
        assert before - after == pytest.approx(float(spectrum.energy[:rank].sum()), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], metric: CorrectionMetric) -> None:
    weight, second = matrix(shape), moment(inputs(300, shape[1]))
    packed = quantize4(weight, 8)
    spectrum = error_spectrum(weight, packed.dequantize(), second, metric=metric)
    corrected = CorrectedWeight(packed, low_rank_correction(spectrum, min(shape), store=whole))
    torch.testing.assert_close(corrected.dequantize(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_moment_beats_its_diagonal_beats_none(shape: tuple[int, int]) -> None:
    weight, second = matrix(shape), moment(inputs(300, shape[1]))
    stored = feedback_int4(weight, second, 8).dequantize()
    left = [
        float(output_errors(weight - stored - made.dequantize(), second).sum())
        for made in (
            low_rank_correction(error_spectrum(weight, stored, second, damping=1e-6), 6, store=whole),
            low_rank_correction(error_spectrum(weight, stored, second, metric="diagonal"), 6, store=whole),
            low_rank_correction(error_spectrum(weight, stored, torch.ones(shape[1])), 6, store=whole),
        )
    ]
    assert left[0] < left[1] < left[2] < float(output_errors(weight - stored, second).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_stored_as_int8(shape: tuple[int, int]) -> None:
    weight, second = matrix(shape), moment(inputs(300, shape[1]))
    stored = quantize4(weight, 8).dequantize()
    spectrum = error_spectrum(weight, stored, second)
    exact, made = low_rank_correction(spectrum, 6, store=whole), low_rank_correction(spectrum, 6)
    assert isinstance(made.down, Int8Weight) and isinstance(made.up, Int8Weight)
    # each factor is off by half a step of 1/127 of its rows' maxima: far less than what is corrected
    assert float((made.dequantize() - exact.dequantize()).norm()) < 0.02 * float(exact.dequantize().norm())
    after = float(output_errors(weight - stored - made.dequantize(), second).sum())
    assert after < float(output_errors(weight - stored, second).sum())


@pytest.mark.parametrize("metric", METRICS)
def test_hard_cases(metric: CorrectionMetric) -> None:
    weight, x = matrix((16, 12)), inputs(300, 12)
    x[:, [0, 7]] = 0.0
    for second in (moment(x), moment(x[:5]), torch.zeros((12, 12))):  # dead inputs, few tokens, none at all
        for stored in (quantize4(weight, 4).dequantize(), weight, torch.zeros_like(weight)):
            made = low_rank_correction(error_spectrum(weight, stored, second, metric=metric), 3)
            assert torch.isfinite(made.dequantize()).all()
            assert made.dequantize().norm() <= 1.5 * (weight - stored).norm()
    exact = low_rank_correction(error_spectrum(weight, weight, moment(x), metric=metric), 3)
    assert not exact.dequantize().any()


def test_what_means_nothing_is_refused() -> None:
    weight = matrix((4, 6))
    with pytest.raises(OptionError, match="shape"):
        error_spectrum(weight, weight[:, :5], torch.eye(6))
    with pytest.raises(CalibrationError, match="not finite"):
        error_spectrum(weight, weight, torch.full((6, 6), float("nan")))
    spectrum = error_spectrum(weight, torch.zeros_like(weight), torch.eye(6))
    for rank in (0, 5):
        with pytest.raises(OptionError, match="rank"):
            low_rank_correction(spectrum, rank)
