"""Tiny random models of every family, with a byte tokenizer, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 60


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def text() -> str:
    return TEXT


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(family, tied=False, dtype=..., shard="10KB"?, **config) -> folder"""

    def make(
        family: str = "llama",
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        shard: str | None = None,
        **extra: Any,
    ) -> Path:
        config_class, model_class, family_options = FAMILIES[family]
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 260,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = config_class(**{**sizes, **family_options, **extra}, tie_word_embeddings=tied)
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif "embed" not in name:
                    parameter.normal_(std=0.2)
        folder = tmp_path / f"{family}-{'tied' if tied else 'untied'}"
        model.to(dtype).save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def real_model() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        folder = Path(__file__).resolve().parents[2].parent / "shared" / "models" / name
        if not folder.is_dir():
            pytest.skip(f"{name} is not here")
        return folder

    return find
