"""Tiny random checkpoints of every supported family, and the real ones where ../shared holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"

SMALL = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
FAMILIES = [
    "llama",
    "llama-tied",
    "llama-mha",
    "llama-bias",
    *(f"llama-{kind}" for kind in ROPES),
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
]


def random_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A float32 model with weights large enough that greedy choices are not ties."""
    options: dict[str, object] = {**SMALL, **overrides}
    torch.manual_seed(seed)
    kind = family.partition("-")[2]
    if family.startswith("llama"):
        options |= {"tied": {"tie_word_embeddings": True}, "mha": {"num_key_value_heads": 4}}.get(kind, {})
        options |= {"attention_bias": True, "mlp_bias": True} if kind == "bias" else {}
        options |= {"rope_parameters": dict(ROPES[kind])} if kind in ROPES else {}
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**options))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(sliding_window=24, **options))
    elif family.startswith("qwen2"):
        window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1} if kind == "window" else {}
        model = Qwen2ForCausalLM(Qwen2Config(**options, **window))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**({"head_dim": 16} | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return model.eval()


def real_model(name: str) -> Path | None:
    """Folder of a trained model: the demo's own, or one of ../shared where that exists."""
    folder = REPOSITORY / "demo" / "storyteller" if name == "demo" else SHARED / "models" / name
    return folder if (folder / "config.json").is_file() else None
