"""transformers' side of the packed format: after `import spq`, `AutoModelForCausalLM.from_pretrained(packed)` works.

Importing this module registers the quantization method `spq` with transformers, which offers no other way;
`spq.registration` imports it when that is needed. Not for compressing (`compress`) and not for serving.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spq.errors import UnsupportedModelError
from spq.layout import EMBEDDING
from spq.manifest import QUANT_METHOD, Manifest, ModulePlan
from spq.modules import CodedIntegers, Int4Embedding, Int8Embedding, TiedHead, packed_embedding, packed_linear
from spq.tensorfile import TensorInfo, read_header


@register_quantization_config(QUANT_METHOD)
class SpqQuantizationConfig(QuantizationConfigMixin):
    """The manifest in transformers' clothes. Raises PackedFormatError for one of another version."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = QUANT_METHOD  # transformers' own enum has no room for it
        self.manifest = Manifest.parse(fields, Path("config.json"))

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return self.manifest.dump()


@register_quantizer(QUANT_METHOD)
class SpqHfQuantizer(HfQuantizer):
    """Swaps the modules of an empty model for packed ones; the loader then fills them by name."""

    requires_calibration = True  # only packed folders can be loaded: compressing is `spq.compress`
    quantization_config: SpqQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Replace every matrix by its plan. Raises UnsupportedModelError where the model has no such module."""
        modules = self.quantization_config.manifest.modules
        tensors: dict[str, TensorInfo] = {}
        for file in checkpoint_files or ():
            tensors |= read_header(Path(file))
        for name, plan in modules.items():
            try:
                old = model.get_submodule(name)
            except AttributeError as error:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no module {name}; load a packed folder with AutoModelForCausalLM"
                ) from error
            bias = getattr(old, "bias", None) is not None if plan.bias is None else plan.bias
            if plan == ModulePlan(kind="dense", shape=tuple(old.weight.shape)):
                continue
            with torch.device("meta"):
                new: nn.Module = packed_embedding(plan) if name == EMBEDDING else packed_linear(plan, bias)
                for integers, entry in plan.coded(name).items():
                    CodedIntegers(integers, entry, tensors[f"{integers}.zstd"].nbytes).stand_in(new, name)
            model.set_submodule(name, new)
        for layer, width in zip(model.model.layers, self.quantization_config.manifest.mlp_widths, strict=True):
            layer.mlp.intermediate_size = width
        embedding = model.get_submodule(EMBEDDING)
        if "lm_head" not in modules and isinstance(embedding, Int8Embedding | Int4Embedding):
            model.lm_head = TiedHead(embedding)
            model._tied_weights_keys = None  # nothing left to tie: the head reads the table itself
            model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Decode what was coded; from here on the model is that of a folder without a codec."""
        for stand_in in [module for module in model.modules() if isinstance(module, CodedIntegers)]:
            stand_in.give_way(model)
        config, manifest = self.quantization_config, self.quantization_config.manifest
        raw = {name: plan.model_copy(update={"codec": "raw"}) for name, plan in manifest.modules.items()}
        config.manifest = manifest.model_copy(update={"modules": raw})

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers have no gradient."""
        return False
