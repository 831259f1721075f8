"""The layer-by-layer run must be the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spq.decoder
from spq.architecture import read_spec
from spq.decoder import LayerRunner


@pytest.mark.parametrize("family", ["llama_bias", "mistral", "qwen2", "qwen3"])
def test_layers_and_scores_equal_the_whole_model(
    make_model: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.up_proj.register_forward_hook(lambda _m, _a, output: seen.append(output.abs().mean(dim=(0, 1))))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(spq.decoder, "MICRO_BATCH_TOKENS", 48)  # two windows at a time, one left over
    spec = read_spec(folder)
    runner = LayerRunner(spec, 24, torch.device("cpu"))
    hidden = states[0].clone()
    for layer in range(spec.num_layers):
        prefix = f"{spec.layer_prefix(layer)}."
        state = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)}
        score = runner.run(layer, runner.build(layer, state), hidden)
        torch.testing.assert_close(score, seen[layer], rtol=1e-4, atol=1e-5)
        if layer + 1 < spec.num_layers:  # the last state transformers returns is normed
            torch.testing.assert_close(hidden, states[layer + 1], rtol=1e-4, atol=1e-4)


def test_window_cuts_attention(make_model: Callable[..., Path]) -> None:
    folder = make_model("mistral")
    runner = LayerRunner(read_spec(folder), 24, torch.device("cpu"))
    mask = runner._mask(0, 24)
    assert mask is not None and torch.equal((mask[0, 0] == 0).sum(dim=1), torch.arange(1, 25).clamp(max=8))
