"""The configuration that is read without transformers' LLaMA class equals what AutoConfig reads, field by field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from spq.architecture import read_spec, spec_of
from spq.errors import ModelFileError
from spq.llama_config import LlamaConfig

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100}
SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                 "original_max_position_embeddings": 64},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing but the family": LLAMA,
    "llama 2 as on the hub": {
        **LLAMA, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "llama 3.1 as on the hub": {
        **LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": SCALED["llama3"] | {"rope_type": "llama3"}, "rope_theta": 500000.0,
        "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "old spelling": {**LLAMA, **SIZES, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "null heads": {**LLAMA, **SIZES, "num_key_value_heads": None, "head_dim": None},
    "biases, tied": {**LLAMA, **SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "generation settings": {**LLAMA, **SIZES, "temperature": 0.7, "do_sample": True, "custom": {"a": 1}},
    "partial rotary factor": {**LLAMA, **SIZES, "partial_rotary_factor": 0.5},
    "quantized": {**LLAMA, **SIZES, "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "remote code": {**LLAMA, **SIZES, "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
    **{f"{kind}, {key}": {**LLAMA, **SIZES, key: values | {"rope_type": kind}, "max_position_embeddings": 256}
       for kind, values in SCALED.items() for key in ("rope_scaling", "rope_parameters")},
}  # fmt: skip
BROKEN: dict[str, dict[str, Any]] = {
    "heads do not divide": {**LLAMA, **SIZES, "num_attention_heads": 7},
    "a text for a number": {**LLAMA, **SIZES, "hidden_size": "wide"},
    "scaling without its factor": {**LLAMA, **SIZES, "rope_scaling": {"rope_type": "linear"}},
    "null where a number belongs": {**LLAMA, **SIZES, "vocab_size": None},
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def contents(config: Any) -> dict[str, Any]:
    """Everything an instance holds, private attributes too."""
    return {name: value for name, value in vars(config).items() if name != "_commit_hash"}


def test_fields_and_defaults_are_those_of_transformers() -> None:
    ours, theirs = dataclasses.fields(LlamaConfig), dataclasses.fields(transformers.LlamaConfig)
    assert len(ours) > 30 and [f.name for f in ours] == [f.name for f in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.default, mine.default_factory) == (its.default, its.default_factory), mine.name
        if mine.name not in ("initializer_range", "rope_parameters"):  # a range there, a TypedDict there
            assert mine.type == its.type, mine.name
    assert contents(LlamaConfig()) == contents(transformers.LlamaConfig())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_reads_as_with_autoconfig(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, VARIANTS[name])
    spec, reference = read_spec(folder), AutoConfig.from_pretrained(folder, local_files_only=True)
    assert type(spec.config) is LlamaConfig and type(reference) is transformers.LlamaConfig
    assert contents(spec.config) == contents(reference)
    assert spec.config.to_dict() == reference.to_dict()
    assert spec == spec_of(reference)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_are_read_by_autoconfig(tmp_path: Path, family: str) -> None:
    folder = write(tmp_path, {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, **SIZES}
                   | {"num_key_value_heads": 2})  # fmt: skip
    reference = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = read_spec(folder).config
    assert type(config) is type(reference) and contents(config) == contents(reference)


@pytest.mark.parametrize("name", BROKEN)
def test_what_transformers_refuses_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, BROKEN[name])
    with pytest.raises(Exception) as theirs:  # whichever it is, ours is the same
        AutoConfig.from_pretrained(folder, local_files_only=True)
    with pytest.raises(Exception) as ours:
        read_spec(folder)
    cause = ours.value.__cause__ if isinstance(ours.value, ModelFileError) else ours.value
    if cause is None:  # refused before transformers was asked: a size that is no number
        assert " is " in str(ours.value) and "it should be a number" in str(ours.value)
        return
    assert type(cause) is type(theirs.value) and str(cause) == str(theirs.value)
