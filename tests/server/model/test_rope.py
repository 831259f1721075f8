"""Frequencies of every kind of rotary embedding equal those of transformers' own module, bit for bit."""

from __future__ import annotations

import pytest
import torch
from models import ROPES, SMALL
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from server.model.rope import RotaryTable

KINDS = {
    "none given": None,
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "theta a whole number": {"rope_type": "default", "rope_theta": 1000000},
    **ROPES,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [None, 12, 64])
def test_cos_and_sin_are_those_of_transformers(kind: str, head_dim: int | None) -> None:
    if kind == "longrope" and head_dim == 64:
        pytest.skip("its factors are those of heads of 12")
    parameters = KINDS[kind]
    config = LlamaConfig(**SMALL, head_dim=head_dim, rope_parameters=None if parameters is None else dict(parameters))
    positions = torch.arange(60)
    cos, sin = RotaryTable(config, 60, torch.device("cpu")).cos_sin(positions, [60] * 60)
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    half = cos.shape[1]
    assert torch.equal(cos, expected_cos[0, :, :half]) and torch.equal(sin, expected_sin[0, :, :half])
    assert torch.equal(expected_cos[0, :, :half], expected_cos[0, :, half:])  # so one half says it all
