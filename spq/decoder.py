"""One decoder layer of a supported family, run on hidden states: what calibration needs and no more.

transformers' own layer classes are used, so that what is measured is the model itself; only one layer exists at a
time. Not for serving (`server.model`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from spq.architecture import ModelSpec

MICRO_BATCH_TOKENS = 4096


class LayerRunner:
    """Builds and runs decoder layers of one model on a device, in float32."""

    def __init__(self, spec: ModelSpec, window_len: int, device: torch.device) -> None:
        family = spec.architecture.removesuffix("ForCausalLM")
        module = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
        self._spec = spec
        self._device = device
        self._config: Any = copy.deepcopy(spec.config)
        self._config._attn_implementation = "sdpa"
        self._layer_class: type[nn.Module] = getattr(module, f"{family}DecoderLayer")
        rotary = getattr(module, f"{family}RotaryEmbedding")(self._config).to(device)
        positions = torch.arange(window_len, device=device)[None]
        probe = torch.zeros((), dtype=torch.float32, device=device)
        self._cos_sin: tuple[Tensor, Tensor] = rotary(probe, positions)  # each [1, window_len, head_dim]
        self._positions = positions

    def build(self, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The layer with these tensors (names inside the layer, float32, on the device); nothing is copied."""
        with torch.device("meta"):
            module = self._layer_class(self._config, layer)
        module.load_state_dict(dict(state), strict=True, assign=True)
        return module.eval()

    @torch.no_grad()
    def run(self, layer: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run hidden [windows, len, hidden] float32 through the layer in place; returns mean |up_proj output| [width].

        Windows go through in micro-batches of at most 4,096 tokens (or one window).
        """
        windows, length = hidden.shape[:2]
        step = max(1, MICRO_BATCH_TOKENS // length)
        up_proj = module.get_submodule("mlp.up_proj")
        total: Tensor = torch.zeros(1, dtype=torch.float64, device=self._device)

        def collect(_module: nn.Module, _args: Any, output: Tensor) -> None:
            nonlocal total
            total = total + output.abs().sum(dim=(0, 1), dtype=torch.float64)

        hook = up_proj.register_forward_hook(collect)
        try:
            for start in range(0, windows, step):
                piece = hidden[start : start + step].to(self._device)
                result = module(
                    piece,
                    attention_mask=self._mask(layer, length),
                    position_ids=self._positions,
                    position_embeddings=self._cos_sin,
                    use_cache=False,
                )
                hidden[start : start + step] = result
        finally:
            hook.remove()
        return (total / (windows * length)).float().cpu()

    def _mask(self, layer: int, length: int) -> Tensor | None:
        """Additive mask [1, 1, len, len] where a sliding window cuts in; None lets attention be plainly causal."""
        window = self._spec.windows[layer]
        if window is None or window >= length:
            return None
        distance = self._positions[0][:, None] - self._positions[0][None, :]
        visible = (distance >= 0) & (distance < window)
        return torch.where(visible, 0.0, float("-inf"))[None, None]
