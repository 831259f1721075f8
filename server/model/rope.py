"""Cosines and sines of rotary embeddings for every `rope_scaling` kind that transformers' LLaMA knows.

Frequencies of the scaled kinds come from transformers; this module only decides which set a token uses. Most kinds have
one set. The unscaled ones are computed here: transformers has them in its model classes, whose import takes 150 MiB.
`longrope` and `dynamic` choose by the length of the sequence at the time a token is computed: as in transformers'
`generate`, that is the prompt's length for prompt tokens and the position + 1 after it. Such keys depend on the
prompt's length, so pages of such a model are shared only where no sequence can pass the trained length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RotaryTable:
    """cos and sin by position, up to `max_len` positions, on one device."""

    def __init__(self, config: PreTrainedConfig, max_len: int, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._kind = str(config.rope_parameters["rope_type"])
        frequencies, self._scaling = _frequencies(config, self._kind)
        self._base = self._table(frequencies, max_len)
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


def _frequencies(config: Any, kind: str) -> tuple[Tensor, float]:
    """float32 [D/2]: radians per position (Su et al. 2021, section 3.2.2), and a factor of cosines and sines."""
    if kind != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config)
        return frequencies, float(scaling)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0
