from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.coded import make_packed, run_row
from kernels.native.library import machine_choice

MIB = 1 << 20


@pytest.mark.program
@pytest.mark.skipif(machine_choice().library is None, reason="the native back end was not built")
def test_a_model_runs_in_less_memory_than_its_packed_weights(tmp_path: Path) -> None:
    packed = make_packed("1024x24", 4, tmp_path / "model")
    cap = 256 * MIB
    assert packed > cap + 40 * MIB
    options = Namespace(threads=2, tokens=2, prompt=4, cap=cap, device="cpu")
    assert "can't allocate memory" in run_row(options, tmp_path / "model", "decoded")["failed"]
    row = run_row(options, tmp_path / "model", "1")
    assert "failed" not in row, row
    assert row["coded_layers"] == 24
    assert row["resident_bytes"] < cap
