from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from server.config import ServerConfig
from spq.architecture import read_spec
from spq.compress import compress
from spq.config import SPQConfig
from spq.fit import STEP_TOKENS, free_for_weights, main, plan, weight_bytes


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=4096).save_pretrained(tmp_path / "7b")
    return tmp_path / "7b"


@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_weights_are_counted_as_the_compressor_writes_them(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str, preset: str
) -> None:
    source = make_model(family, dtype=torch.float16)
    options = SPQConfig.preset(preset, calibration_windows=4, calibration_len=16)
    report = compress(source, tmp_path / "out", options, calibration_text=text, device=torch.device("cpu"))
    assert weight_bytes(read_spec(source), preset) == report.bytes_packed


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3"])
def test_the_default_preset_never_takes_more_than_int8(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    """So the bytes of int8 are what to plan with before its ranks and widths are known."""
    source = make_model(family, dtype=torch.float16)
    options = SPQConfig.preset("default", calibration_windows=4, calibration_len=16)
    report = compress(source, tmp_path / "out", options, calibration_text=text, device=torch.device("cpu"))
    assert report.bytes_packed <= weight_bytes(read_spec(source), "int8")


def test_the_largest_step_is_the_servers() -> None:
    assert ServerConfig.model_fields["max_batch_tokens"].default == STEP_TOKENS


def test_a_llama_of_7b(seven: Path) -> None:
    spec = read_spec(seven)
    assert weight_bytes(spec, "float16") == 2 * 6_738_415_616
    assert weight_bytes(spec, "int8") == pytest.approx(6.74e9, rel=2e-3)
    eight = plan(spec, "int8", 8 << 30, 4096, 1, 360e9, True)
    assert eight.tokens_per_s_one == pytest.approx(0.75 * 360e9 / (eight.weights + eight.kv / 2))
    assert not plan(spec, "float16", 8 << 30, 4096, 1, None, True).fits
    left = free_for_weights(spec, 8 << 30, 4096, 2, True)
    assert 0 < left < 8 << 30


def test_what_does_not_fit_is_told_coded(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = read_spec(seven)
    roomy = plan(spec, "int8", 12 << 30, 4096, 1, 360e9, True, 1.4e9)
    assert roomy.coded_layers == 0 and roomy.tokens_per_s_coded == pytest.approx(roomy.tokens_per_s_one)
    small = plan(spec, "int8", 6 << 30, 4096, 1, 360e9, True, 1.4e9)
    assert small.sequences == 0 and small.coded_layers is not None and 0 < small.coded_layers < 32
    layer = (weight_bytes(spec, "int8") - 2 * 32000 * 4096) / 32
    held = small.total + (2 - small.coded_layers) * layer
    assert held <= 6 << 30 < held + 1.05 * layer
    read_s = (small.weights + small.kv / 2) / (0.75 * 360e9)
    late_s = small.coded_layers * layer * (1 / 1.4e9 - 1 / 0.75 / 360e9)
    assert small.tokens_per_s_coded == pytest.approx(1 / (read_s + late_s), rel=1e-2)
    assert plan(spec, "float16", 6 << 30, 4096, 1, 360e9, True, 1.4e9).coded_layers is None  # it has no integers
    assert plan(spec, "int8", 1 << 30, 4096, 1, 360e9, True, 1.4e9).coded_layers is None  # not even the arena
    flags = [str(seven), "--gpu-memory", "6GiB", "--concurrency", "1", "--bandwidth", "360GB", "--feed", "1.4GB"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert f"with --resident coded: {small.coded_layers} layers" in text and "cannot run, coded or not" in text


def test_the_command_line(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(seven), "--gpu-memory", "8GiB", "--context", "4096", "--concurrency", "4"]
    assert main([*flags, "--bandwidth", "360GB"]) == 0
    text = capsys.readouterr().out
    assert "float16" in text and "spq-compress MODEL --budget" in text
    assert main([*flags, "--json"]) == 0
    assert {p["variant"] for p in json.loads(capsys.readouterr().out)["plans"]} >= {"int8", "int4"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "much"], "'much' is not a size"),
        (["--gpu-memory", "8GiB", "--context", "9999"], "context 9999 is beyond the model's 4096"),
        (["--gpu-memory", "8GiB", "--concurrency", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(seven: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(seven), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spq-plan: ") and error.count("\n") == 1 and message in error
