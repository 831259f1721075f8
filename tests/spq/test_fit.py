from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from spq.architecture import read_spec
from spq.compress import compress
from spq.config import SPQConfig
from spq.fit import free_for_weights, main, plan, weight_bytes


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


def test_a_llama_of_7b(seven: Path) -> None:
    spec = read_spec(seven)
    assert weight_bytes(spec, "float16") == 2 * 6_738_415_616
    assert weight_bytes(spec, "int8") == pytest.approx(6.74e9, rel=2e-3)
    eight = plan(spec, "int8", 8 << 30, 4096, 1, 360e9, True)
    assert eight.tokens_per_s_one == pytest.approx(0.75 * 360e9 / (eight.weights + eight.kv / 2))
    assert not plan(spec, "float16", 8 << 30, 4096, 1, None, True).fits
    left = free_for_weights(spec, 8 << 30, 4096, 2, True)
    assert 0 < left < 8 << 30


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
