"""Models of int4, corrections and pairs of any kind: the same logits from every back end and from transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Harness
from models import SMALL, random_model
from transformers import AutoConfig, AutoModelForCausalLM

import spq.hf  # noqa: F401  (registers the packed format with transformers)
from kernels.native.library import machine_choice
from kernels.native.program import fits
from kernels.ops import BackendName
from kernels.weights import dequantized
from spq.checkpoint import Checkpoint, open_model
from spq.layout import model_vectors
from spq.manifest import CorrectionPlan, ModulePlan
from tests.packed import write_packed

IDS = torch.randint(3, SMALL["vocab_size"], (60,), generator=torch.Generator().manual_seed(1)).tolist()
# By layer, for each matrix; what is not named is int4 in symmetric groups of 32.
LAYERS: list[dict[str, dict[str, Any]]] = [
    {
        "q_proj": {"kind": "int4", "group": 16, "symmetric": False},
        "k_proj": {"kind": "int8"},
        "v_proj": {"kind": "int4", "group": 32, "correction": CorrectionPlan(rank=5)},
        "o_proj": {"kind": "int8", "group": 10, "correction": CorrectionPlan(rank=4, factors="int4")},
        "down_proj": {"kind": "int4", "group": 32, "symmetric": False, "correction": CorrectionPlan(rank=3)},
    },
    {
        "q_proj": {"kind": "low_rank", "rank": 21, "factors": "int4", "group": 16},
        "k_proj": {"kind": "low_rank", "rank": 12, "factors": "int8"},
        "o_proj": {"kind": "int4", "group": 2},
        "gate_proj": {"kind": "int8"},
        "up_proj": {"kind": "int4", "group": 128, "symmetric": False},
        "down_proj": {"kind": "low_rank", "rank": 30, "factors": "int4", "group": 32},
    },
    {},
]
WITH_FLOATS: dict[str, dict[str, Any]] = {
    "k_proj": {"kind": "dense"},
    "o_proj": {"kind": "int4", "group": 32, "correction": CorrectionPlan(rank=4, factors="dense")},
    "up_proj": {"kind": "dense", "correction": CorrectionPlan(rank=4)},
    "down_proj": {"kind": "low_rank", "rank": 9, "factors": "dense"},
}


def mixed(source: Path, out: Path, *, bias: bool, floats: bool = False) -> Path:
    """A packed folder; with `bias`, down_proj has one that the architecture does not know."""

    def plan(name: str, shape: tuple[int, int]) -> ModulePlan:
        local = name.rpartition(".")[2]
        if not name.startswith("model.layers."):
            correction = CorrectionPlan(rank=6) if local == "lm_head" else None
            return ModulePlan(kind="int4", shape=shape, group=16, symmetric=False, correction=correction)
        index = int(name.split(".")[2])
        options = LAYERS[index].get(local, {"kind": "int4", "group": 32})
        if floats and index == 2:
            options = WITH_FLOATS.get(local, options)
        return ModulePlan(shape=shape, bias=True if bias and local == "down_proj" else None, **options)

    return write_packed(source, out, plan)


def exact_logits(folder: Path, source: Path, ids: list[int]) -> torch.Tensor:
    """transformers' own model in float64 with every matrix multiplied out: [T, vocab]."""
    packed: Checkpoint = open_model(folder)
    config = AutoConfig.from_pretrained(source)
    assert packed.manifest is not None
    extra = any(plan.bias for plan in packed.manifest.modules.values())
    if extra:
        config.mlp_bias = True  # LLaMA's switch for all three: those of gate and up are zeros
    model = AutoModelForCausalLM.from_config(config).double()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    state |= {name: packed.vector(name).double() for name in model_vectors(packed.spec)}
    for name in packed.manifest.modules:
        weight = dequantized(packed.embedding() if name == "model.embed_tokens" else packed.linear(name))
        state[f"{name}.weight"] = weight.weight.double()
        if weight.bias is not None:
            assert f"{name}.bias" in state
            state[f"{name}.bias"] = weight.bias.double()
    if packed.spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


def served(folder: Path, ids: list[int], backend: BackendName) -> tuple[torch.Tensor, Harness]:
    """Logits [T, vocab] of the server's model, prefilled in chunks."""
    harness = Harness(folder, backend=backend, max_batch_tokens=23)
    rows: list[torch.Tensor] = []
    original = harness.model.forward

    def forward(*arguments: object) -> torch.Tensor:
        hidden = original(*arguments)  # type: ignore[arg-type]
        rows.append(harness.model.logits(hidden))
        return hidden

    harness.model.forward = forward  # type: ignore[method-assign]
    harness.run([harness.sequence(ids, max_tokens=0)])
    return torch.cat(rows), harness


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


# As in test_backends: 1e-4 (cpu, only int8 rounds) or 5.3e-5 (native) for each of at most 30 matrices that read rounded
# activations in 3 layers, independent of each other; float32: 5e-6.
LIMITS: dict[BackendName, float] = {"reference": 5e-6, "cpu": 1e-4 * 30**0.5, "native": 5.3e-5 * 40**0.5}
CASES = [("llama", True, False), ("llama-tied", True, True), ("qwen2", False, False), ("qwen3", False, False)]


@pytest.mark.parametrize(("family", "bias", "floats"), CASES)
def test_logits_are_those_of_the_dequantized_weights(family: str, bias: bool, floats: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    random_model(family).save_pretrained(source)
    folder = mixed(source, tmp_path / "packed", bias=bias, floats=floats)
    exact = exact_logits(folder, source, IDS)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        assert error(loaded(torch.tensor([IDS])).logits[0], exact) < LIMITS["reference"]
    backends: list[BackendName] = ["reference", "cpu"]
    if machine_choice().library is not None:
        backends.append("native")
    for backend in backends:
        logits, harness = served(folder, IDS, backend)
        assert error(logits, exact) < LIMITS[backend], backend
        if backend == "native" and family == "qwen3":  # heads of 16: all layers in one call
            assert fits(harness.model._weights.layers, harness.cache)


def test_saving_writes_the_same_tensors(tmp_path: Path) -> None:
    random_model("llama-tied").save_pretrained(tmp_path / "source")
    folder = mixed(tmp_path / "source", tmp_path / "a", bias=True, floats=True)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    first, second = open_model(folder), open_model(tmp_path / "b")
    assert first.manifest == second.manifest
    assert all(torch.equal(first.vector(name), second.vector(name)) for name in first.tensors)


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_generation_is_that_of_the_reference(backend: BackendName, tmp_path: Path) -> None:
    if backend == "native" and machine_choice().library is None:
        pytest.skip(machine_choice().reason)
    random_model("qwen3").save_pretrained(tmp_path / "source")
    folder = mixed(tmp_path / "source", tmp_path / "packed", bias=False)
    found, wanted = (Harness(folder, backend=name) for name in (backend, "reference"))
    [mine], [theirs] = (h.run([h.sequence(IDS[:20], max_tokens=12)]) for h in (found, wanted))
    assert mine.token_ids == theirs.token_ids
