"""The quantization method `spq` as vLLM knows methods: what a folder's manifest asks for, and what is refused.

Not the layers (`methods`). The model stays vLLM's own class: of LLaMA, Mistral, Qwen2 and Qwen3 a packed folder keeps
architecture, rotary embedding and attention, and changes matrices alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from spq.architecture import spec_of
from spq.checkpoint import open_model
from spq.errors import UnsupportedModelError
from spq.manifest import QUANT_METHOD, Manifest
from spq_vllm.methods import HeadMethod, SpqLinearMethod, TableMethod

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class SpqQuantizationConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """A manifest in vLLM's clothes."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.manifest = manifest

    def get_name(self) -> str:
        """Of the method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the Triton kernels are compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None but config.json, which vLLM has read."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpqQuantizationConfig:
        """From `quantization_config` of config.json. Raises PackedFormatError naming the field."""
        return cls(Manifest.parse(config, Path("config.json")))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once the configuration is read and before anything is loaded: the place to refuse.

        Raises UnsupportedModelError for an architecture or a rotary embedding that is not served alike, and for a
        folder what `spq.checkpoint.open_model` raises: missing, damaged or contradictory files, by name.
        """
        if hf_config is not None:
            check_model(hf_config)
        if Path(model_name).is_dir():
            open_model(Path(model_name)).close()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is held; None for attention, whose cache stays as vLLM has it.

        Raises UnsupportedModelError for LoRA, and for a linear layer that the manifest does not know.
        """
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            config = get_current_vllm_config()
            if config.lora_config is not None:
                raise UnsupportedModelError("LoRA on spq weights is not supported; start without --enable-lora")
            if isinstance(layer, ParallelLMHead):
                return HeadMethod(self.manifest)
            if isinstance(layer, VocabParallelEmbedding):
                return TableMethod(self.manifest)
            return SpqLinearMethod(self.manifest, prefix)
        return None


def check_model(config: Any) -> None:
    """Raises UnsupportedModelError for what vLLM would compute in another way than transformers and this project.

    `longrope` and `dynamic` take their frequencies from the length of a sequence there, from the longest possible one
    in vLLM.
    """
    spec_of(config)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"rope_type {kind!r}: vLLM computes other frequencies than spq-serve; supported: {', '.join(ROPE_KINDS)}"
        )
