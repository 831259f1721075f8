"""LoRA recovery: what is trained, what is not, and what becomes of it in the packed folder."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spq.calibrate import text_hash, tokenize
from spq.checkpoint import open_model
from spq.cli import main
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import CalibrationError, OptionError
from spq.judge import Judge
from spq.recover import Update, attach, prepare, train
from spq.report import Report, read_report
from spq.texts import EvaluationText

CPU = torch.device("cpu")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not here (extra: recovery)")
PRUNE = {"variance_threshold": 1.0, "min_prune_ratio": 0.5, "max_prune_ratio": 0.5}
SVD = {"variance_threshold": 0.6, "max_prune_ratio": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "pruned": PRUNE,
    "pairs": SVD,
    "both": PRUNE | {"variance_threshold": 0.6},
    "bias": PRUNE | {"compensation": "bias"},
    "refit_int4": PRUNE | {"prune_score": "energy", "compensation": "refit", "bits": 4, "feedback": True},
    "corrected_coded": PRUNE | {"correction_rank": 2, "entropy_coding": True},
    "scaled_pairs": SVD | {"scaling_alpha": 0.5, "svd_metric": "whitened"},
    "float": PRUNE | {"quantize": False},
    "budget": {"name": "budget", "ratio": 0.45},
}


def compressed(source: Path, out: Path, text: str, recovery_text: str = "", **overrides: Any) -> Report:
    values = {"calibration_windows": 8, "calibration_len": 32, "group": 16, "rank_multiple": 4, "min_saving": 0.0}
    values |= {"recover_steps": 4, "recover_lr": 1e-2} | overrides
    options = SPQConfig.preset(values.pop("name", "default"), **values)
    return compress(source, out, options, calibration_text=text, recovery_text=recovery_text, device=CPU)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loss_of(folder: Path, text: str) -> float:
    ids = tokenize(folder, text)[None, :60]
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return float(model(ids, labels=ids).loss)


@needs_peft
@pytest.mark.parametrize("name", CASES)
def test_training_is_kept_by_every_kind_of_storage(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str
) -> None:
    source = make_model("llama")
    trained = compressed(source, tmp_path / "trained", text, **CASES[name])
    compressed(source, tmp_path / "plain", text, **CASES[name], recover_steps=0, recover_lr=1e-3)
    found = trained.recovery
    assert found is not None and found.loss_after < found.loss_before
    assert found.steps == 4 and found.text_hash == text_hash(text)
    assert loss_of(tmp_path / "trained", text) < loss_of(tmp_path / "plain", text) - 0.02
    manifests = [open_model(tmp_path / which).manifest for which in ("trained", "plain")]
    assert manifests[0] is not None and manifests[1] is not None
    assert manifests[0].modules == manifests[1].modules  # same ranks, widths and bits, so the same bytes
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == sorted(
        path.name for path in (tmp_path / "plain").iterdir()
    )
    if name == "scaled_pairs":  # norms carry the scales
        return
    before = tensors_of(source)
    for tensor, value in tensors_of(tmp_path / "trained").items():
        if "norm" in tensor or tensor == "model.embed_tokens.weight":
            assert torch.equal(value, before[tensor]), tensor


@needs_peft
@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "qwen3", "mistral"])
def test_updates_of_zero_change_nothing(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model(family)
    exact = CASES["both"] | {"compensation": "none"}  # a refit is rounded on its way through the float model
    in_float = exact | {"compensation": "bias", "scaling_alpha": 0.4, "quantize": False}

    def untrained(*args: Any) -> tuple[dict[str, Update], Any]:
        updates, report = train(*args)
        return {name: (down, torch.zeros_like(up)) for name, (down, up) in updates.items()}, report

    monkeypatch.setattr("spq.run.train", untrained)
    for how, out in ((exact, "exact"), (in_float, "float")):
        compressed(source, tmp_path / out, text, **how)
        compressed(source, tmp_path / f"{out}-plain", text, **how, recover_steps=0, recover_lr=1e-3)
    before = tensors_of(tmp_path / "exact-plain")
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(tmp_path / "exact").items())
    ids = tokenize(source, text)[None, :60]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(tmp_path / which, dtype=torch.float32)(ids).logits
            for which in ("float", "float-plain")
        ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@needs_peft
def test_only_matrices_of_the_layers_are_trained(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model("llama_bias")
    compressed(source, tmp_path / "out", text, **SVD, quantize=False, recover_steps=0, recover_lr=1e-3)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = attach(model, 4, seed=0)
    assert any(name.endswith("q_proj.up") for name in layers) and any(name.endswith("down_proj") for name in layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(layers)
    for _ in range(3):
        ids = torch.randint(3, 250, (2, 20))
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD(trained, 1.0).step()
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(bool(value.any()) for name, value in after.items() if "lora_B" in name)


@needs_peft
def test_two_runs_write_the_same_bytes_and_a_seed_matters(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    source = make_model()
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(out) + seed)  # the caller's generator plays no part
        compressed(source, tmp_path / out, text, **PRUNE, seed=seed)
    first, second, other = (tensors_of(tmp_path / out) for out in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert any(not torch.equal(first[name], other[name]) for name in first if name in other)


@needs_peft
def test_without_svd_pruning_and_rounding_a_plain_checkpoint_comes_out(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compressed(make_model(), out, text, variance_threshold=1.0, max_prune_ratio=0.0, quantize=False)
    loss = loss_of(out, text)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert open_model(out).manifest is None
    assert loss_of(out, text) == pytest.approx(loss, abs=1e-6)


@needs_peft
def test_a_learning_rate_that_diverges_is_named(
    make_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model()
    monkeypatch.setattr("spq.recover.SCALING", 10**40)
    with pytest.raises(OptionError, match=r"recover_lr 0\.1: the loss is .*lower it"):
        compressed(source, tmp_path / "out", text, **PRUNE, recover_lr=0.1)
    assert not (tmp_path / "out").exists()


def test_windows_of_a_lesson_are_disjoint_and_avoid_others() -> None:
    ids = torch.arange(100)
    avoid = ids[20:40].view(2, 10)
    lesson = prepare(ids, 10, 0, "hash", avoid)
    rows = [tuple(row) for part in (lesson.windows, lesson.held_out) for row in part.tolist()]
    assert len(rows) == len(set(rows)) == 8 and len(lesson.held_out) == 2
    assert not set(rows) & {tuple(row) for row in avoid.tolist()}
    with pytest.raises(CalibrationError, match="leaves 1 windows of 60"):
        prepare(ids, 60, 0, "hash")


def test_the_evaluation_text_is_never_trained_on(
    make_model: Callable[..., Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "copy"):
        (tmp_path / name).write_text(text)
    flags = [str(make_model()), "-o", str(tmp_path / "out"), "--recover-steps", "1", "--evaluate"]
    for way in (["--recover-text"], ["--calibration"]):
        assert main([*flags, str(tmp_path / "copy"), *way, str(tmp_path / "one")]) == 2
        assert "copy: is the text that is trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recover-text", "f"], "--recover-text f: nothing is trained; add --recover-steps"),
        (["--recover-rank", "4"], "recover_rank or recover_lr without recover_steps"),
        (["--recover-lr", "0"], "option recover_lr"),
        (["--recover-steps", "1", "--target-perplexity", "9"], "what training gains cannot be predicted"),
    ],
)
def test_options_that_mean_nothing_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["nowhere", "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_extra_one_line_names_it(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model()
    capsys.readouterr()
    monkeypatch.setattr("spq.recover.importlib.util.find_spec", lambda name: None)
    assert main([str(source), "-o", str(tmp_path / "out"), "--recover-steps", "1"]) == 2
    assert capsys.readouterr().err == (
        "spq-compress: recover_steps needs peft; install the extra: pip install 'spq-serve[recovery]'\n"
    )


@needs_peft
def test_the_report_and_its_lines(
    make_model: Callable[..., Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(text * 3)
    flags = [str(make_model()), "-o", str(tmp_path / "out"), "--recover-steps", "2", "--calibration-len", "32"]
    assert main([*flags, "--preset", "int8", "--recover-text", str(tmp_path / "text"), "--device", "cpu"]) == 0
    found = read_report(tmp_path / "out").recovery
    assert found is not None and found.tokens == 2 * 2048 and math.isfinite(found.loss_after)
    assert f"recovered loss {found.loss_before:.4f} -> {found.loss_after:.4f} nats" in capsys.readouterr().out


@needs_peft
def test_the_text_of_training_is_no_text_to_judge_by(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    compressed(make_model(), tmp_path / "out", text, **PRUNE)
    judges = {
        name: Judge([EvaluationText(name, content)], CPU, torch.float32)
        for name, content in (("seen", text), ("new", text + "A different end."))
    }
    with pytest.raises(OptionError, match=r"out: was trained on seen \(recovery\); evaluate it on another text"):
        judges["seen"].folder(tmp_path / "out")
    assert judges["new"].folder(tmp_path / "out").texts["new"].perplexity > 1
