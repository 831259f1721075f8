from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spq.apply import Applier
from spq.budget import ASSORTMENTS, open_markets
from spq.calibrate import choose_windows, tokenize
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.manifest import ModulePlan
from spq.progress import StageClock
from spq.quality import compare
from spq.quantize import GranularityRule
from spq.recipe import Recipe, Storage
from spq.report import Report
from spq.scoring import KeptLogits, LocalModel
from spq.source import Source

CPU = torch.device("cpu")
PROSE = (Path(__file__).resolve().parents[2] / "demo" / "calibration.txt").read_text("utf-8")[:60_000]


@pytest.fixture
def trained(make_model: Callable[..., Path]) -> Path:
    """A model that knows a little about letters: losses mean something only where the text is not a surprise."""
    folder = make_model(tied=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.08)
    ids = tokenize(folder, PROSE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        starts = torch.randint(0, len(ids) - 49, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 48] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder


def budgeted(source: Path, out: Path, text: str, **overrides: object) -> Report:
    options = SPQConfig.preset("budget", **({"calibration_windows": 4, "calibration_len": 16, "group": 16} | overrides))
    return compress(source, out, options, calibration_text=text, device=CPU)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("llama", False), ("llama_bias", True), ("mistral", False), ("qwen2", True), ("qwen3", False)],
)
def test_the_budget_is_kept_and_nearly_used(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str, tied: bool
) -> None:
    source = make_model(family, tied=tied)
    for ratio in (0.5, 0.36):
        report = budgeted(source, tmp_path / f"{ratio}", text, ratio=ratio)
        assert 0.93 * ratio <= report.ratio <= ratio
        assert report.prediction is not None and report.prediction.measured is not None
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{ratio}", dtype=torch.float32)
        logits = model(torch.arange(3, 13)[None]).logits
        assert bool(torch.isfinite(logits).all())


def test_smaller_budgets_cost_more(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model()
    rises = []
    for number, ratio in enumerate((0.55, 0.45, 0.38, 0.33)):
        report = budgeted(source, tmp_path / str(number), text, ratio=ratio)
        assert report.prediction is not None
        rises.append(report.prediction.rise)
    assert rises == sorted(rises) and rises[0] < rises[-1]


def test_too_small_a_budget_names_the_smallest(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a budget of 1000 bytes is below the smallest .* \d+ bytes; raise it"):
        budgeted(make_model(), tmp_path / "out", text, budget="1000")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_makes_the_same_bytes(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model()
    for name in ("a", "b"):
        budgeted(source, tmp_path / name, text, ratio=0.4)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "spq_report.json"}
        for name in ("a", "b")
    )
    assert first == second


def test_a_prediction_comes_true_and_a_perplexity_is_reached(trained: Path, tmp_path: Path) -> None:
    how = {"calibration_windows": 100, "calibration_len": 48}
    for ratio in (0.5, 0.4, 0.3):
        found = budgeted(trained, tmp_path / str(ratio), PROSE, ratio=ratio, **how).prediction
        assert found is not None and found.base is not None and found.predicted is not None
        assert found.measured == pytest.approx(found.predicted, rel=0.05) and not found.weak
    target = found.base * 1.02
    report = budgeted(trained, tmp_path / "out", PROSE, target_perplexity=target, **how)
    assert report.prediction is not None and report.prediction.measured is not None
    assert report.prediction.measured <= target and report.ratio < 0.5
    with pytest.raises(OptionError, match="is not above that of the original"):
        budgeted(trained, tmp_path / "never", PROSE, target_perplexity=found.base * 0.9, **how)


def test_the_choice_that_measures_best_is_kept(trained: Path, tmp_path: Path) -> None:
    report = budgeted(trained, tmp_path / "out", PROSE, ratio=0.33, calibration_windows=60, calibration_len=48)
    found = report.prediction
    assert found is not None and len(found.tried) > 1 and next(iter(found.tried)) == "everything"
    assert found.kl == min(found.tried.values())
    whole = report.num_pruned_neurons == 0
    plain = report.num_low_rank == 0 and not any("correction" in str(m) for m in report.matrices.values())
    kept = min(found.tried, key=lambda name: found.tried[name])
    assert whole or kept == "everything"
    assert plain or kept != "bits alone"
    original = LocalModel(trained, CPU, torch.float32)
    windows = torch.arange(96).view(2, 48) % original.spec.vocab_size
    packed = LocalModel(tmp_path / "out", CPU, torch.float32)
    assert compare(packed, KeptLogits(original, windows), windows) == compare(packed, original, windows)


def test_assortments_leave_out_what_they_say(make_model: Callable[..., Path], text: str) -> None:
    source = make_model()
    options = SPQConfig.preset("budget", ratio=0.4, calibration_windows=4, calibration_len=16, group=16)
    checkpoint = open_model(source)
    windows, _ = choose_windows(tokenize(source, text), 4, 16, 0)
    applier = Applier(options, GranularityRule.over("channel", [8]), torch.float16)
    storage = Storage(group=16, symmetric=False, float_bytes=2)
    clock = StageClock(1, 1.0, None)
    markets = open_markets(Source(source, checkpoint, CPU), options, applier, storage, windows, clock)
    assert list(markets) == list(ASSORTMENTS)
    full = checkpoint.spec.intermediate_size
    for name, market in markets.items():
        offered = [option for part in market.parts for option in part]
        recipes = [recipe for option in offered for recipe in option.recipes.values()]
        narrower = any(option.width is not None and option.width[1] < full for option in offered)
        assert narrower == (name == "everything")
        assert any(recipe.rank is not None for recipe in recipes) == (name != "bits alone")
    least = [min(part, key=lambda option: option.nbytes) for part in markets["bits alone"].parts]
    budget = sum(option.nbytes for option in least) + markets["bits alone"].fixed_bytes
    assert markets["bits alone"].fits(budget) and not markets["bits alone"].fits(budget - 1)
    losses = [market.decide(budget).predicted_nll or 0.0 for market in markets.values()]
    assert losses[0] == min(losses)


def test_no_windows_left_is_said(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    tokens = len(text)
    report = budgeted(
        make_model(), tmp_path / "out", text, ratio=0.5, calibration_windows=tokens // 16, calibration_len=16
    )
    assert report.prediction is not None and report.prediction.measured is None
    with pytest.raises(OptionError, match="no windows of the calibration text are left"):
        budgeted(
            make_model(), tmp_path / "b", text, target_perplexity=1e6, calibration_windows=tokens // 16,
            calibration_len=16,
        )  # fmt: skip


@pytest.mark.parametrize(
    "recipe",
    [Recipe("dense"), Recipe("int8"), Recipe("int4"), Recipe("int8", 5), Recipe("int4", 7), Recipe("int4", None, 3)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_recipes_know_their_bytes(recipe: Recipe, symmetric: bool) -> None:
    storage = Storage(group=16, symmetric=symmetric, float_bytes=2)
    plan: ModulePlan = storage.plan(recipe, (33, 41), None)
    sizes = {"int8": 1, "uint8": 1, "float": 2, "F16": 2, "F32": 4}
    listed = sum(math.prod(shape) * sizes[kind] for shape, kind in plan.tensors("m", False).values())
    assert storage.nbytes(recipe, (33, 41)) == listed
