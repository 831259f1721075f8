"""Alpha and zeroed integers chosen by matrix: within the loss allowed, and no fewer bytes to be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.weights import Int8Weight
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.moments import Moments, output_energy
from spq.quantize import quantize
from spq.report import Report
from spq.scaling import channel_scales, coded_bytes, prune_integers
from spq.squeeze import ALPHAS, FRACTIONS, Candidate, choose, squeeze

CPU = torch.device("cpu")


def rounded(_name: str, weight: Tensor) -> Int8Weight:
    return quantize(weight, per_channel=True)


@pytest.fixture
def inputs() -> Moments:
    """Of 64 channels, some of them far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    found = Moments(64, CPU)
    found.add(torch.randn(500, 64, generator=generator) * torch.logspace(-1, 1, 64))
    return found


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, 64, generator=generator) for name, rows in (("a", 40), ("b", 24))}


def every_candidate(weights: dict[str, Tensor], inputs: Moments) -> list[Candidate]:
    found = []
    for alpha in ALPHAS:
        scales = channel_scales(inputs.peak, alpha)
        for fraction in FRACTIONS:
            leaves = [prune_integers(rounded("", w * scales), inputs.peak / scales, fraction) for w in weights.values()]
            losses = [
                output_energy(w - leaf.dequantize() / scales, inputs.second) / output_energy(w, inputs.second)
                for w, leaf in zip(weights.values(), leaves, strict=True)
            ]
            found.append(Candidate(alpha, fraction, max(losses), sum(map(coded_bytes, leaves))))
    return found


@pytest.mark.parametrize("budget", [1e-4, 1e-3, 1e-2, 0.1])
def test_it_finds_what_trying_everything_finds(weights: dict[str, Tensor], inputs: Moments, budget: float) -> None:
    best = choose(every_candidate(weights, inputs), budget)
    found = squeeze(weights, inputs.second, inputs.peak, rounded, scaled=True, budget=budget)
    assert (found.alpha, found.fraction, found.nbytes) == (best.alpha, best.fraction, best.nbytes)
    assert found.loss == pytest.approx(best.loss) and found.loss <= budget


def test_without_a_norm_in_front_nothing_is_scaled(weights: dict[str, Tensor], inputs: Moments) -> None:
    found = squeeze(weights, inputs.second, inputs.peak, rounded, scaled=False, budget=0.01)
    assert found.alpha == 0 and found.fraction > 0
    zero = {"a": torch.zeros(4, 64)}
    found = squeeze(zero, inputs.second, inputs.peak, rounded, scaled=False, budget=0.01)
    assert (found.loss, found.nbytes) == (0, 0)


def test_the_smallest_within_the_budget() -> None:
    candidates = [
        Candidate(0.0, 0.0, loss=1.0, nbytes=100),
        Candidate(0.5, 0.0, loss=2.0, nbytes=80),
        Candidate(0.4, 0.1, loss=1.5, nbytes=80),
        Candidate(1.0, 0.0, loss=5.0, nbytes=50),
    ]
    assert choose(candidates, 1.0).alpha == 0.0
    assert choose(candidates, 4.0).alpha == 0.4
    assert choose(candidates, 5.0).alpha == 1.0
    with pytest.raises(OptionError, match=r"budget of 0\.5, but the least loss of a matrix is 1"):
        choose(candidates, 0.5)


def packed(source: Path, out: Path, text: str, loss: float) -> Report:
    options = SPQConfig.preset("int8", coding_loss=loss, entropy_coding=True, calibration_windows=8, calibration_len=32)
    return compress(source, out, options, calibration_text=text, device=CPU)


def test_a_larger_loss_takes_fewer_bytes_and_the_report_says_what_was_chosen(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    source = make_model()
    little, much = (packed(source, tmp_path / str(loss), text, loss) for loss in (1e-3, 0.05))
    assert much.bytes_packed < little.bytes_packed
    for report in (little, much):
        for name, matrix in report.matrices.items():
            assert (matrix.zeroed is None) == ("layers" not in name)
    layers = [m for name, m in much.matrices.items() if "layers" in name]
    assert any(m.alpha for m in layers) and any(m.zeroed for m in layers)
    assert all(m.alpha == 0 for name, m in much.matrices.items() if name.endswith(("o_proj", "down_proj")))


def test_a_loss_that_rounding_alone_exceeds_is_named(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"coding_loss, model\.layers\.0, attention: .* raise it"):
        packed(make_model(), tmp_path / "out", text, 1e-9)
    assert not (tmp_path / "out").exists()
