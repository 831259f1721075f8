"""Every option of a compression ends in a folder that transformers and the reference back end read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spq.calibrate import tokenize
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.report import Report
from tests.spq.test_hf import plain_twin

CPU = torch.device("cpu")
FAMILIES = [("llama", True), ("qwen2", False), ("qwen3", True), ("llama_bias", False)]
SVD = {"variance_threshold": 0.6, "max_prune_ratio": 0.0}
PRUNE = {"variance_threshold": 1.0, "max_prune_ratio": 0.3}
NONE = {"variance_threshold": 1.0, "max_prune_ratio": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "whitened": SVD | {"svd_metric": "whitened"},
    "whitened_float": SVD | {"svd_metric": "whitened", "quantize": False},
    "residual": SVD | {"svd_metric": "whitened", "svd_residual": 0.25},
    "last_layers": SVD | {"svd_last_layers": 1},
    "pairs_of_int4": SVD | {"bits": 4},
    "energy": PRUNE | {"prune_score": "energy", "compensation": "none"},
    "up": PRUNE | {"prune_score": "up", "compensation": "none"},
    "bias": PRUNE | {"prune_score": "energy", "compensation": "bias"},
    "bias_float": PRUNE | {"compensation": "bias", "quantize": False},
    "refit": PRUNE | {"compensation": "refit"},
    "int4": NONE | {"bits": 4},
    "int4_symmetric_tables": NONE | {"bits": 4, "symmetric": True, "embedding_bits": 4},
    "feedback_int8": NONE | {"feedback": True},
    "feedback_int4": NONE | {"feedback": True, "bits": 4},
    "correction": NONE | {"bits": 4, "correction_rank": 4},
    "correction_of_pruning": PRUNE | {"quantize": False, "correction_rank": 4},
    "scaling": NONE | {"scaling_alpha": 0.5},
    "integer_pruning": NONE | {"integer_pruning": 0.3},
    "coding_loss": NONE | {"coding_loss": 0.01, "entropy_coding": True},
    "coded": NONE | {"integer_pruning": 0.6, "entropy_coding": True},
    "everything": {
        "variance_threshold": 0.6, "max_prune_ratio": 0.3, "svd_metric": "whitened", "prune_score": "energy",
        "bits": 4, "embedding_bits": 4, "symmetric": True, "feedback": True,
        "correction_rank": 4, "scaling_alpha": 0.3, "integer_pruning": 0.2, "entropy_coding": True,
    },
}  # fmt: skip


def compressed(source: Path, out: Path, text: str, **overrides: Any) -> Report:
    small = {"calibration_windows": 8, "calibration_len": 32, "group": 16, "rank_multiple": 4, "min_saving": 0.0}
    return compress(source, out, SPQConfig.preset("default", **(small | overrides)), calibration_text=text, device=CPU)


def two_families_of_four() -> list[tuple[str, str, bool]]:
    """Each option on two families in turn, all together on all four."""
    return [
        (name, *family)
        for number, name in enumerate(OPTIONS)
        for family in (FAMILIES if name == "everything" else FAMILIES[number % 2 :: 2])
    ]


@pytest.mark.parametrize(("name", "family", "tied"), two_families_of_four())
def test_transformers_computes_what_is_stored(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str, family: str, tied: bool
) -> None:
    source = make_model(family, tied=tied)
    report = compressed(source, tmp_path / "out", text, **OPTIONS[name])
    assert report.ratio < 0.75 or not report.options.quantize
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint = open_model(tmp_path / "out")
    if any(plan.bias for plan in checkpoint.manifest.modules.values()):  # type: ignore[union-attr]
        assert name.startswith("bias")  # the twin has no place for them: see test_biases_of_dropped_neurons
        return
    twin = plain_twin(source, checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, twin(ids).logits, rtol=2e-4, atol=2e-4)


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return found


def test_scaling_alone_changes_nothing_in_float(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model()
    compressed(source, tmp_path / "out", text, **NONE, scaling_alpha=0.8, quantize=False)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(logits_of(tmp_path / "out", ids), logits_of(source, ids), rtol=1e-4, atol=1e-4)


def test_scaling_leaves_factor_pairs_what_they_are(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source, ids = make_model(), torch.arange(3, 40)[None]
    for number, alpha in enumerate((0.0, 0.8)):
        compressed(source, tmp_path / str(number), text, **SVD, scaling_alpha=alpha, quantize=False)
    assert open_model(tmp_path / "1").manifest.modules["model.layers.0.self_attn.q_proj"].kind == "low_rank"  # type: ignore[union-attr]
    torch.testing.assert_close(logits_of(tmp_path / "1", ids), logits_of(tmp_path / "0", ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_compensation_helps(make_model: Callable[..., Path], text: str, tmp_path: Path, compensation: str) -> None:
    source = make_model()
    how = {"variance_threshold": 1.0, "max_prune_ratio": 0.4, "min_prune_ratio": 0.4, "quantize": False}
    ids = tokenize(source, text)[None, :60]
    errors = []
    for number, kind in enumerate(("none", compensation)):
        compressed(source, tmp_path / str(number), text, **how, prune_score="energy", compensation=kind)
        errors.append(float((logits_of(tmp_path / str(number), ids) - logits_of(source, ids)).square().mean()))
    assert errors[1] < errors[0]


def test_feedback_and_corrections_help(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model()
    ids = tokenize(source, text)[None, :60]
    errors = []
    for number, extra in enumerate(({}, {"feedback": True}, {"feedback": True, "correction_rank": 12})):
        compressed(source, tmp_path / str(number), text, **NONE, bits=4, **extra)
        errors.append(float((logits_of(tmp_path / str(number), ids) - logits_of(source, ids)).square().mean()))
    assert errors[2] < errors[1] < errors[0]


def test_only_the_last_layers_are_factorised(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    compressed(make_model(), tmp_path / "out", text, **SVD, svd_last_layers=1)
    manifest = open_model(tmp_path / "out").manifest
    assert manifest is not None
    layers = {name.split(".")[2] for name, plan in manifest.modules.items() if plan.kind == "low_rank"}
    assert layers == {"2"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"svd_residual": 0.2}, "svd_residual with the plain metric changes nothing"),
        ({"compensation": "bias", "max_prune_ratio": 0.0}, "compensation bias without pruning"),
        ({"prune_score": "up", "max_prune_ratio": 0.0}, "prune_score up without pruning"),
        ({"quantize": False, "bits": 4}, "bits without quantize"),
        ({"quantize": False, "entropy_coding": True}, "entropy_coding without quantize"),
        ({"bits": 4, "integer_pruning": 0.1}, "integer_pruning at 4 bits with zero points"),
        ({"coding_loss": 0.1, "entropy_coding": True}, "coding_loss with variance_threshold"),
        ({**NONE, "coding_loss": 0.1, "entropy_coding": True, "scaling_alpha": 0.5}, "coding_loss with scaling_alpha"),
        ({**NONE, "coding_loss": 0.1}, "coding_loss without entropy_coding"),
        ({"feedback": True, "granularity": "tensor"}, "feedback with granularity tensor"),
        ({"budget": 1000, "ratio": 0.3}, "budget and ratio: give one of them"),
        ({"ratio": 0.3}, "variance_threshold is chosen by the allocator"),
        ({"bits": 3}, "option bits"),
        ({"budget": "many"}, "option budget: .*'many' is not a size"),
        ({"group": 15}, "option group"),
    ],
)
def test_options_that_contradict_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SPQConfig.preset("default", **overrides)


def test_the_preset_for_budgets_needs_one() -> None:
    with pytest.raises(OptionError, match="preset budget without a budget"):
        SPQConfig.preset("budget")
