"""Cosines and sines of rotary embeddings for every `rope_scaling` kind that transformers' LLaMA knows.

The frequencies come from transformers; this module only decides which set a token uses. Most kinds have one set.
`longrope` and `dynamic` choose by the length of the sequence at the time a token is computed: as in transformers'
`generate`, that is the prompt's length for prompt tokens and the position + 1 after it. Such keys depend on the
prompt's length, so pages of such a model are shared only where no sequence can pass the trained length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryTable:
    """cos and sin by position, up to `max_len` positions, on one device."""

    def __init__(self, config: PretrainedConfig, max_len: int, device: torch.device) -> None:
        embedding = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # reads what all four families have
        self._config = config
        self._device = device
        self._kind = str(embedding.rope_type)
        self._scaling = float(embedding.attention_scaling)
        self._base = self._table(embedding.original_inv_freq, max_len)
        self._long: tuple[Tensor, Tensor] | None = None
        self._threshold = max_len  # sequences longer than this use other frequencies
        if self._kind == "dynamic":
            self._threshold = config.max_position_embeddings
        if self._kind == "longrope":
            self._threshold = config.rope_parameters["original_max_position_embeddings"]
            frequencies, _scaling = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=self._threshold + 1)
            self._long = self._table(frequencies, max_len)
        self.length_dependent = max_len > self._threshold

    def varies(self, lengths: list[int]) -> bool:
        """Whether some of these sequence lengths have frequencies of their own."""
        return self.length_dependent and max(lengths, default=0) > self._threshold

    def cos_sin(self, positions: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """float32 [T, D/2] each for positions int64 [T]; `lengths` are the governing sequence lengths [T], or empty
        where these do not vary. Only where they do, the host sends anything to the device."""
        cos, sin = self._base[0][positions], self._base[1][positions]
        if not self.varies(lengths):
            return cos, sin
        rows = [i for i, length in enumerate(lengths) if length > self._threshold]
        if self._long is not None:
            index = torch.tensor(rows, device=self._device)
            cos[index], sin[index] = self._long[0][positions[index]], self._long[1][positions[index]]
            return cos, sin
        for length in {lengths[i] for i in rows}:  # dynamic NTK: one set of frequencies per length
            index = torch.tensor([i for i in rows if lengths[i] == length], device=self._device)
            frequencies, _scaling = ROPE_INIT_FUNCTIONS["dynamic"](self._config, None, seq_len=length)
            angles = positions[index, None].float() * frequencies.to(self._device)
            cos[index], sin[index] = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos, sin

    def _table(self, frequencies: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(max_len, device=self._device).float()[:, None] * frequencies.float().to(self._device)
        return angles.cos() * self._scaling, angles.sin() * self._scaling
