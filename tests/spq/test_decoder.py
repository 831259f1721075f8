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
        found = runner.run(layer, runner.build(layer, state), hidden, observe=("score",))
        assert found.score is not None and not found.moments
        torch.testing.assert_close(found.score, seen[layer], rtol=1e-4, atol=1e-5)
        if layer + 1 < spec.num_layers:  # the last state transformers returns is normed
            torch.testing.assert_close(hidden, states[layer + 1], rtol=1e-4, atol=1e-4)


def test_window_cuts_attention(make_model: Callable[..., Path]) -> None:
    folder = make_model("mistral")
    runner = LayerRunner(read_spec(folder), 24, torch.device("cpu"))
    mask = runner._mask(0, 24)
    assert mask is not None and torch.equal((mask[0, 0] == 0).sum(dim=1), torch.arange(1, 25).clamp(max=8))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_moments_are_those_of_the_inputs_of_the_model(
    make_model: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(0))
    paths = {"attention": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "mlp": ("gate_proj", "up_proj"),
             "down": ("down_proj",)}  # fmt: skip
    seen: dict[str, torch.Tensor] = {}
    for name, part in model.model.layers[1].named_modules():
        if name.endswith("_proj"):
            local = name.rpartition(".")[2]
            part.register_forward_pre_hook(lambda _m, args, local=local: seen.update({local: args[0]}))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    monkeypatch.setattr(spq.decoder, "MICRO_BATCH_TOKENS", 48)
    spec = read_spec(folder)
    runner = LayerRunner(spec, 24, torch.device("cpu"))
    prefix = f"{spec.layer_prefix(1)}."
    state = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)}
    module = runner.build(1, state)
    found = runner.run(1, module, states[1].clone(), observe=("attention", "o", "mlp", "down"))
    assert found.score is None and list(found.moments) == list(paths)
    for name, moments in found.moments.items():
        for reader in paths[name]:
            x = seen[reader].flatten(0, 1).double()
            assert moments.count == 5 * 24
            scale = float((x.T @ x / len(x)).abs().max())
            torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * scale)
            torch.testing.assert_close(moments.mean, x.mean(dim=0), rtol=1e-4, atol=1e-5 * scale**0.5)
            torch.testing.assert_close(moments.peak, x.abs().amax(dim=0).float(), rtol=1e-4, atol=1e-5)
    again = runner.run(1, module, states[1].clone(), observe=("down",))  # hooks of the run before are gone
    assert list(again.moments) == ["down"] and found.moments["down"].count == 120
    torch.testing.assert_close(again.moments["down"].second, found.moments["down"].second, rtol=0, atol=0)
