"""A LLaMA of random weights in the shape asked for, to measure speed where no trained model of that size is at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def random_model(shape: str, tokenizer: Path, folder: Path) -> Path:
    """Write the model under `folder` once and return its path. `shape` is WIDTHxLAYERS; MLPs are 8/3 as wide.

    The vocabulary is that of the model in `tokenizer`. Raises ValueError for a shape that means nothing.
    """
    width, _, layers = shape.partition("x")
    if not (width.isdecimal() and layers.isdecimal()) or int(width) % HEAD_DIM or not int(layers):
        raise ValueError(f"--random {shape}: give WIDTHxLAYERS with a width that is a multiple of {HEAD_DIM}")
    out = folder / f"random-{shape}"
    if (out / "config.json").is_file():
        return out
    source = AutoConfig.from_pretrained(tokenizer)
    heads = int(width) // HEAD_DIM
    config = LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=int(width),
        intermediate_size=-(-int(width) * 8 // 3 // 128) * 128,
        num_hidden_layers=int(layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=source.max_position_embeddings,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)
    return out
