"""The whole model through every back end: packed weights against transformers with the dequantized ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Harness
from int4_folder import write_int4_folder
from models import SMALL, random_model, real_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.ops import BackendName
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 400


def pack(source: Path, out: Path, preset: str, **options: object) -> Path:
    if not (source / "tokenizer.json").exists():  # random models: no calibration text, so no pruning
        options |= {"max_prune_ratio": 0.0}
    compress(source, out, SPQConfig.preset(preset, **options), calibration_text=TEXT, device=torch.device("cpu"))
    return out


def dequantized_logits(packed: Path, template: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """transformers' float64 logits [T, vocab] with the packed weights multiplied out; pruned neurons are zeros."""
    source = open_model(packed)
    model = template.double()
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and tensor.dim() == 2:
                is_table = module == "model.embed_tokens" or (module == "lm_head" and source.spec.tied)
                weight = (source.embedding() if is_table else source.linear(module)).dequantize().double()
                tensor.zero_()
                tensor[: weight.shape[0], : weight.shape[1]] = weight
            elif leaf == "bias":
                bias = source.linear(module).bias
                assert bias is not None
                tensor.zero_()
                tensor[: len(bias)] = bias.double()
            else:
                tensor.copy_(source.vector(name).double())
        return model(torch.tensor([ids])).logits[0]


def served_logits(folder: Path, ids: list[int], backend: BackendName, **options: object) -> torch.Tensor:
    """Log-probabilities and logits of the server's model, prefilled in chunks: [T, vocab]."""
    harness = Harness(folder, backend=backend, max_batch_tokens=23, **options)  # type: ignore[arg-type]
    rows: list[torch.Tensor] = []
    original = harness.model.forward

    def forward(*arguments: object) -> torch.Tensor:
        hidden = original(*arguments)  # type: ignore[arg-type]
        rows.append(harness.model.logits(hidden))
        return hidden

    harness.model.forward = forward  # type: ignore[method-assign]
    harness.run([harness.sequence(ids, max_tokens=0)])
    return torch.cat(rows)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


# The two-digit int8 path without VNNI keeps an activation to within a / (2 * 63 * 126), a the row's largest entry: an
# rms error of 3.6e-5 a, and a is about 3 times the rms of a row, so 1e-4 per matrix. The errors of the 7 matrices of 6
# layers are independent: 1e-4 * sqrt(42) = 6.5e-4 (seen: 2.5e-4). float32: 6e-8 * sqrt(192 terms), 42 sums: 5e-6.
CPU_INT8 = 6.5e-4
# With 16384 levels an activation is kept to within a / (2 * 16384): an rms error of 1.8e-5 a, so 5.3e-5 a matrix.
NATIVE_INT8 = 3.4e-4
FLOAT32 = 5e-6


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_packed_logits_are_those_of_the_dequantized_weights(family: str, backend: BackendName, tmp_path: Path) -> None:
    template = random_model(family)
    template.save_pretrained(tmp_path / "source")
    options = {"variance_threshold": 0.7, "min_saving": 0.0, "rank_multiple": 1}
    packed = pack(tmp_path / "source", tmp_path / "packed", "default", **options)
    assert any(p.kind == "low_rank" for p in open_model(packed).manifest.modules.values())  # type: ignore[union-attr]
    ids = torch.randint(3, SMALL["vocab_size"], (60,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = dequantized_logits(packed, template, ids)
    assert (
        error(served_logits(packed, ids, backend), exact)
        < {"cpu": CPU_INT8, "native": NATIVE_INT8, "reference": FLOAT32}[backend]
    )


@pytest.mark.parametrize("preset", ["default", "paper", "int8"])
def test_the_packed_demo_model_agrees_with_from_pretrained(preset: str, tmp_path: Path) -> None:
    source = real_model("demo")
    assert source is not None
    packed = pack(source, tmp_path / "packed", preset, calibration_windows=2, calibration_len=64)
    ids = torch.randint(8, 4000, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    exact = dequantized_logits(packed, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), ids)
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert error(loaded, exact) < FLOAT32
    assert error(served_logits(packed, ids, "reference"), exact) < FLOAT32
    assert error(served_logits(packed, ids, "cpu"), exact) < CPU_INT8
    assert error(served_logits(packed, ids, "native"), exact) < NATIVE_INT8


@pytest.mark.parametrize(("packed", "kv_dtype"), [(True, torch.int8), (False, torch.float32)])
def test_triton_kernels_run_the_whole_model(packed: bool, kv_dtype: torch.dtype, tmp_path: Path) -> None:
    """Under Triton's interpreter on CPU tensors; the same code runs on CUDA."""
    pytest.importorskip("triton")
    family = "qwen3"  # every kernel: head norms, two key heads to four query heads
    template = random_model(family, num_hidden_layers=1)
    folder = tmp_path / "source"
    template.save_pretrained(folder)
    if packed:
        options = {"variance_threshold": 0.7, "min_saving": 0.0, "rank_multiple": 1}
        folder = pack(folder, tmp_path / "packed", "default", **options)
    ids = torch.randint(3, SMALL["vocab_size"], (30,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = served_logits(folder, ids, "reference", kv_dtype=kv_dtype)
    # int8 rounds at different last bits on either side: a rounding step of a cache entry is 1/254 of its row's largest
    limit = 2e-2 if kv_dtype == torch.int8 else 1e-5
    assert error(served_logits(folder, ids, "triton", kv_dtype=kv_dtype), exact.double()) < limit
    harness = Harness(folder, backend="triton", kv_dtype=kv_dtype)
    [sequence] = harness.run([harness.sequence(ids, max_tokens=3)])  # decodes too
    reference = Harness(folder, backend="reference", kv_dtype=kv_dtype)
    assert reference.run([reference.sequence(ids, max_tokens=3)])[0].token_ids == sequence.token_ids


def test_triton_kernels_run_a_model_of_int4_and_corrections(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder = write_int4_folder(tmp_path / "packed")
    ids = torch.randint(3, SMALL["vocab_size"], (30,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = served_logits(folder, ids, "reference").double()
    assert error(served_logits(folder, ids, "triton"), exact) < 1e-5
    harness = Harness(folder, backend="triton")
    [sequence] = harness.run([harness.sequence(ids, max_tokens=3)])  # decodes too
    reference = Harness(folder, backend="reference")
    assert reference.run([reference.sequence(ids, max_tokens=3)])[0].token_ids == sequence.token_ids
