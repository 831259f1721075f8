from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.footprint import Footprint, measure_footprint
from spq.layout import model_linears, model_vectors
from spq.manifest import CorrectionPlan, Manifest, ModulePlan


def _footprint(stored: int, total: int, bits: int) -> Footprint:
    return Footprint(1, 1, 2 * total, total, total, stored, stored * bits)


@given(st.integers(0, 99), st.sampled_from([2, 3, 4, 8, 16]))
def test_tcr_is_the_papers_formula_for_sparsity_and_bits(sparsity: int, bits: int) -> None:
    found = _footprint(1000 * (100 - sparsity), 100_000, bits)
    assert found.tcr == pytest.approx(1 - (bits / 16) * (1 - sparsity / 100), abs=1e-12)
    assert found.sparsity == pytest.approx(sparsity / 100) and found.bits_per_stored_weight == bits


def test_the_papers_own_points() -> None:
    points = {(0, 4): 0.75, (25, 4): 0.8125, (0, 3): 0.8125, (50, 4): 0.875, (0, 2): 0.875}
    for (sparsity, bits), tcr in points.items():
        assert _footprint(100 - sparsity, 100, bits).tcr == tcr


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float16, True), (torch.float32, False)])
def test_a_plain_folder(make_model: Callable[..., Path], dtype: torch.dtype, tied: bool) -> None:
    folder = make_model(dtype=dtype, tied=tied, shard="40KB")
    found = measure_footprint(folder)
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    assert found.num_parameters == sum(t.numel() for t in tensors)
    assert found.resident_bytes == sum(t.nbytes for t in tensors)
    assert found.file_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found.stored_weights == found.num_weights == sum(t.numel() for t in tensors if t.dim() == 2)
    assert found.tcr == (0.0 if dtype == torch.float16 else -1.0)
    assert found.mcr == pytest.approx(0.0 if dtype == torch.float16 else -1.0, abs=0.1)
    assert found.bits_per_weight == 8 * found.file_bytes / found.num_parameters


def test_a_packed_folder_pays_for_what_it_stores(make_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    folder, out = make_model(tied=True), tmp_path / "packed"
    options = SPQConfig.preset(
        "default", variance_threshold=0.5, min_saving=0.0, max_prune_ratio=0.3, rank_multiple=1, width_multiple=1,
        calibration_windows=2, calibration_len=32,
    )  # fmt: skip
    report = compress(folder, out, options, calibration_text=text, device=torch.device("cpu"))
    assert report.num_low_rank > 0 and report.num_pruned_neurons > 0
    found, plain = measure_footprint(out), measure_footprint(folder)
    tensors = load_file(out / "model.safetensors")
    integers = [t for t in tensors.values() if t.dtype == torch.int8]
    assert found.stored_weights == sum(t.numel() for t in integers) < found.num_weights
    assert found.payload_bits == 8 * found.stored_weights and found.bits_per_stored_weight == 8
    assert found.tcr == 1 - sum(t.numel() for t in integers) / (2 * plain.num_weights) > 0.5
    assert found.resident_bytes == sum(t.nbytes for t in tensors.values())
    assert (found.num_weights, found.fp16_bytes) == (plain.num_weights, 2 * plain.num_parameters)
    assert found.file_bytes == (out / "model.safetensors").stat().st_size


def test_coded_integers_are_resident_decoded(make_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    found = []
    for name, coded in (("raw", False), ("coded", True)):
        options = SPQConfig.preset(
            "int8", integer_pruning=0.6, entropy_coding=coded, calibration_windows=2, calibration_len=32
        )
        compress(make_model(), tmp_path / name, options, calibration_text=text, device=torch.device("cpu"))
        found.append(measure_footprint(tmp_path / name))
    assert found[1].resident_bytes == found[0].resident_bytes and found[1].file_bytes != found[0].file_bytes


def test_four_bits_with_corrections_and_pairs(make_model: Callable[..., Path]) -> None:
    folder = make_model(tied=True)
    checkpoint = open_model(folder)
    spec = checkpoint.spec
    checkpoint.close()
    plans: dict[str, ModulePlan] = {}
    for name, shape in model_linears(spec).items():
        plans[name] = ModulePlan(kind="int4", shape=shape, group=16, symmetric=False)
    head, pair = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    plans[head] = plans[head].model_copy(update={"correction": CorrectionPlan(rank=3)})
    plans[pair] = ModulePlan(kind="low_rank", shape=plans[pair].shape, rank=5, factors="int4", group=8)
    manifest = Manifest(options=SPQConfig.preset("default"), mlp_widths=(spec.intermediate_size,) * 3, modules=plans)
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in model_vectors(spec).items()}
    kinds = {"int8": torch.int8, "uint8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
    for name, plan in plans.items():
        for tensor, (shape, dtype) in plan.tensors(name, False).items():
            tensors[tensor] = torch.zeros(shape, dtype=kinds[dtype])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": manifest.dump()}))
    found = measure_footprint(folder)
    int4 = sum(prod(plan.shape) for name, plan in plans.items() if name != pair) + 5 * sum(plans[pair].shape)
    int8 = 3 * sum(plans[head].shape)
    assert (found.stored_weights, found.payload_bits) == (int4 + int8, 4 * int4 + 8 * int8)
    assert found.resident_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.tcr == 1 - (4 * int4 + 8 * int8) / (16 * found.num_weights)
