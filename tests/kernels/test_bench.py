"""The benchmark program runs as a command and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.bench import main, measure
from kernels.bench_cases import Case
from kernels.bench_machine import copy_gb_s
from kernels.native.library import machine_choice

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_quick_run_prints_a_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "kernels.bench",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--quick",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads(file.read_text())
    assert report["quick"] is True
    assert report["machine"]["device"] == "cpu" and report["machine"]["threads"] == 1 and report["machine"]["cpu"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["copy_gb_s"] > 0 and report["date"].endswith("+00:00") and "commit" in report
    assert report["int8_methods"]["cpu"] in {"fbgemm", "onednn", "widened"}
    results = report["results"]
    assert len(lines) == len(results) + 3
    operations = {"int8_linear", "int4_linear", "low_rank", "mlp_input", "attention_input"}
    operations |= {"decode_attention", "prefill_attention"}
    backends = {r["backend"] for r in results}
    assert backends == {"reference", "cpu"} | ({"native"} if machine_choice().library else set())
    for backend in backends:
        assert {r["op"] for r in results if r["backend"] == backend} == operations
    for r in results:
        assert 0 < r["q20_us"] <= r["median_us"] <= r["q80_us"]
        assert r["gb_s"] == pytest.approx(r["nbytes"] / r["median_us"] / 1e3)
        assert r["percent_of_copy"] == pytest.approx(100 * r["gb_s"] / report["copy_gb_s"])
    linear = next(r for r in results if r["op"] == "int8_linear" and r["shape"]["rows"] == 3)
    assert linear["shape"] == {"rows": 3, "out": 48, "in": 64}
    assert linear["nbytes"] == 48 * 64 + 48 * 4 + 3 * (48 + 64) * 4
    halves = next(r for r in results if r["op"] == "int4_linear" and r["shape"]["rows"] == 3)
    assert halves["nbytes"] == 48 * 32 + 48 * 2 + 3 * (48 + 64) * 4


def test_items_rotate() -> None:
    seen: list[int] = []
    case = Case("op", {}, 8, seen.append, [0, 1, 2])
    result = measure(case, "cpu", 1.0, CPU, 0.0)
    assert seen == [0, 0, 1, 2]
    assert result.nbytes == 8


def test_copy_rate_is_plausible() -> None:
    assert 0.05 < copy_gb_s(CPU, 1 << 22) < 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err


def test_refuses_no_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--threads", "0"])
    assert "at least 1" in capsys.readouterr().err
