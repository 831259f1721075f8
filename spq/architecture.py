"""Which model families are served, and the handful of numbers in which they differ.

Not a configuration format: transformers reads `config.json`; this is the part of it the engine needs, checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spq.errors import ModelFileError, UnsupportedModelError
from spq.llama_config import LlamaConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
KV_SCALE_BYTES = 4  # float32 scale per token and head of an int8 cache


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of one model. `config` is transformers' own object, kept for rotary embeddings and saving."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # before pruning
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool  # lm_head is the embedding
    qk_norm: bool  # RMS norm over each query and key head (Qwen3)
    windows: tuple[int | None, ...]  # sliding window per layer, None = full attention
    max_positions: int
    eos_token_ids: tuple[int, ...]
    config: PreTrainedConfig = field(compare=False, repr=False)

    def layer_prefix(self, layer: int) -> str:
        """Module path of a decoder layer."""
        return f"model.layers.{layer}"

    def kv_token_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values of one token over all layers; integers of 1 byte have a float32 scale per head."""
        per_head = self.head_dim * itemsize + (KV_SCALE_BYTES if itemsize == 1 else 0)
        return 2 * self.num_layers * self.num_kv_heads * per_head

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven matrices of a layer by their path inside it, before compression."""
        hidden, width = self.hidden_size, self.intermediate_size
        query, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a model folder. Raises ModelFileError or UnsupportedModelError, naming what is wrong."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{folder}: no config.json; a model is a folder in Hugging Face format")
    try:
        config = _read_config(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelFileError(f"{folder / 'config.json'}: {error}") from error
    return spec_of(config)


def _read_config(folder: Path) -> PreTrainedConfig:
    """What `AutoConfig` reads; of a LLaMA without its import (`spq.llama_config`). Raises what that raises."""
    fields, _unused = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    kind = LlamaConfig if fields.get("model_type") == LlamaConfig.model_type else AutoConfig
    config: PreTrainedConfig = kind.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,  # said aloud: without it, transformers asks on the terminal
        name_or_path=str(folder),
    )
    return config


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    """The spec of a transformers configuration. Raises UnsupportedModelError."""
    names = config.architectures or []
    architecture = names[0] if names else f"(none; model_type {config.model_type})"
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"{architecture} with hidden_act {config.hidden_act!r}: only 'silu' is supported")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % config.num_key_value_heads:
        raise UnsupportedModelError(f"{heads} query heads cannot share {config.num_key_value_heads} key/value heads")
    eos: Any = config.eos_token_id
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(config, architecture),
        max_positions=_max_positions(config),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        config=config,
    )


def _windows(config: PreTrainedConfig, architecture: str) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: `layer_types` says which layers have one. LLaMA: none."""
    window: int | None = getattr(config, "sliding_window", None)
    layers: int = config.num_hidden_layers
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple([window if kind == "sliding_attention" else None for kind in kinds])


def _max_positions(config: PreTrainedConfig) -> int:
    """Tokens the rotary embedding reaches. `linear` and `dynamic` configs state the length before scaling (as vLLM
    reads them); `yarn` states either; the other kinds state the length after it."""
    rope = config.rope_parameters
    trained: int = config.max_position_embeddings
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(trained * rope["factor"])
    if rope["rope_type"] == "yarn":
        return max(trained, int(rope.get("original_max_position_embeddings", trained) * rope["factor"]))
    return trained
