from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from spq.compress import compress
from spq.config import SPQConfig
from spq.footprint import Footprint, measure_footprint


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
