from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.weights import dequantized
from spq.checkpoint import Checkpoint, open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import PackedFormatError
from spq.layout import model_vectors

CASES = [
    ("llama", True),
    ("llama", False),
    ("llama_bias", True),
    ("mistral", False),
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
]


def plain_twin(source: Path, packed: Checkpoint) -> Any:
    """The original class with dequantized weights; pruned neurons are zero rows and columns, which add nothing."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {name: packed.vector(name).float() for name in model_vectors(packed.spec)}
    assert packed.manifest is not None
    for name, plan in packed.manifest.modules.items():
        leaf = packed.embedding() if name == "model.embed_tokens" else packed.linear(name)
        dense = dequantized(leaf)
        old = model.get_submodule(name).weight
        weight = torch.zeros_like(old)
        weight[: plan.shape[0], : plan.shape[1]] = dense.weight
        state[f"{name}.weight"] = weight
        if dense.bias is not None:
            state[f"{name}.bias"] = torch.zeros(old.shape[0])
            state[f"{name}.bias"][: plan.shape[0]] = dense.bias
    if packed.spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("quantize", [True, False])
def test_logits_equal_the_dequantized_model(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str, tied: bool, quantize: bool
) -> None:
    source, out = make_model(family, tied=tied), tmp_path / "out"
    options = SPQConfig.preset(
        "default",
        variance_threshold=0.6,
        max_prune_ratio=0.3,
        quantize=quantize,
        calibration_windows=4,
        calibration_len=16,
    )
    report = compress(source, out, options, calibration_text=text, device=torch.device("cpu"))
    assert report.num_low_rank > 0 and report.num_pruned_neurons > 0
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(0))  # beyond Mistral's window of 8
    with torch.no_grad():
        logits = model(ids).logits
        expected = plain_twin(source, open_model(out))(ids).logits
    # two matrix products instead of one in the low-rank layers: a few eps of the largest logit per layer
    assert (logits - expected).abs().max() < 100 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_saving_writes_the_packed_format_again(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    options = SPQConfig.preset("default", calibration_windows=4, calibration_len=16)
    compress(make_model(tied=True), tmp_path / "a", options, calibration_text=text, device=torch.device("cpu"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = open_model(tmp_path / "a"), open_model(tmp_path / "b")
    assert first.manifest == second.manifest
    assert all(torch.equal(first.vector(name), second.vector(name)) for name in first.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_float32_scales(
    make_model: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    options = SPQConfig.preset("int8")
    compress(make_model(tied=True), tmp_path / "a", options, calibration_text="", device=torch.device("cpu"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    assert model.model.embed_tokens.scale.dtype == torch.float32
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)(ids).logits
    assert output.hidden_states[0].dtype == dtype and output.logits.dtype == dtype
    error = (output.logits.float() - full).abs().max() / full.abs().max()
    assert error < 16 * torch.finfo(dtype).eps


def test_other_versions_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    compress(make_model(), tmp_path / "a", SPQConfig.preset("int8"), calibration_text="", device=torch.device("cpu"))
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(PackedFormatError, match="version 9"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
