"""Which model families are served, and the handful of numbers in which they differ.

Not a configuration format: transformers reads `config.json`; this is the part of it the engine needs, checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spq.errors import ModelFileError, SpqError, UnsupportedModelError
from spq.jsonfile import read_json_object
from spq.llama_config import LlamaConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LARGE = 1 << 31
COUNTS = {  # of config.json, with the most that each may be
    "vocab_size": LARGE, "hidden_size": LARGE, "intermediate_size": LARGE, "num_hidden_layers": 1000,
    "num_attention_heads": LARGE, "num_key_value_heads": LARGE, "head_dim": LARGE,
    "max_position_embeddings": LARGE, "sliding_window": LARGE,
}  # fmt: skip
OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
KINDS: dict[str, type | tuple[type, ...]] = {
    "architectures": list, "model_type": str, "rms_norm_eps": (int, float), "rope_parameters": dict,
    "rope_scaling": dict, "rope_theta": (int, float), "layer_types": list,
}  # fmt: skip
MAX_SHOWN_CHARS = 80
MAX_MESSAGE_CHARS = 500
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
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFileError(f"{folder}: no config.json; a model is a folder in Hugging Face format")
    _check_fields(path, read_json_object(path))
    try:
        return spec_of(_read_config(folder))
    except SpqError:
        raise
    except Exception as error:  # transformers' own code on a file that may be hostile: it raises whatever it meets
        message = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE_CHARS]
        raise ModelFileError(f"{path}: not a configuration that can be read ({message})") from error


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Refuse what would make transformers or us count to numbers that no model has. Raises ModelFileError."""
    for name, most in COUNTS.items():
        value = fields.get(name, 1)
        if (type(value) is not int or not 1 <= value <= most) and not (value is None and name in OPTIONAL):
            raise ModelFileError(f"{path}: {name} is {_shown(value)}, it should be a number from 1 to {most}")
    for name, kinds in KINDS.items():
        value = fields.get(name)
        if value is not None and not isinstance(value, kinds):
            raise ModelFileError(f"{path}: {name} is {_shown(value)}, which it cannot be")
    ends = fields.get("eos_token_id")
    if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends or 0])):
        raise ModelFileError(f"{path}: eos_token_id is {_shown(ends)}, it should be a token's number or several")


def _shown(value: Any) -> str:
    return ascii(value)[:MAX_SHOWN_CHARS]


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
