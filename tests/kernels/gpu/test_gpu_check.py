"""The parts of the GPU check, on the CPU in Triton's interpreter: that they run, and that they can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import gpu_check
from kernels.gpu import check_correctness
from kernels.gpu.backend import TritonOps
from kernels.gpu.check_decode import TINY_MODEL, VARIANTS, DecodeState, decode_step, random_decoder
from kernels.gpu.check_speed import copy_bandwidth, decode_attention, int8_products
from kernels.reference import ReferenceOps

ROOT = Path(__file__).resolve().parents[3]
FLOAT32_LOGITS = 1e-5  # a few hundred float32 operations between embedding and logits


def test_every_operation_passes(device):
    rows = list(gpu_check.correctness(device, [torch.float16], tiny=True))
    assert [row for row in rows if not row["ok"]] == []
    names = " ".join(row["name"] for row in rows)
    for operation in ("embed", "logits", "linear", "qkv", "gate_up_silu", "down", "rms_norm", "rotary_store"):
        assert operation in names
    for attention in ("decode attention, int8", "prefill attention, int8", "decode attention, 16-bit"):
        assert attention in names


def test_a_wrong_kernel_fails_and_a_broken_one_hides_no_other(device, monkeypatch):
    right = check_correctness.TritonOps.rms_norm
    monkeypatch.setattr(check_correctness.TritonOps, "rms_norm", lambda *a: right(*a) * 1.01)
    monkeypatch.setattr(check_correctness.TritonOps, "embed", lambda *a: 1 / 0)
    rows = list(gpu_check.correctness(device, [torch.float32], tiny=True))
    failed = {row["name"]: row for row in rows if not row["ok"]}
    assert set(failed) == {"embed", "rms_norm"}
    assert "ZeroDivisionError" in failed["embed"]["detail"]


def test_a_section_that_raises_is_recorded(capsys):
    report = gpu_check.Report()

    def rows():
        yield {"name": "first", "value": 1.5}
        raise RuntimeError("the kernel broke")

    report.section("one", rows)
    report.section("two", lambda: [{"ok": True}])
    assert not report.ok
    assert report.sections["one"]["rows"] == [{"name": "first", "value": 1.5}]
    assert "the kernel broke" in report.sections["one"]["error"]
    assert "error" not in report.sections["two"]
    assert "two" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_of_each_variant(device, variant):
    rows = list(gpu_check.decoding(device, torch.float16, variant, tiny=True, steps=1))
    assert [row["batch"] for row in rows] == [1, 8]
    assert all(row["ok"] and row["eager_tokens_per_s"] > 0 for row in rows)


def test_decoding_agrees_with_the_reference(device):
    logits = []
    for ops in (TritonOps(device, torch.float32), ReferenceOps(device, torch.float64)):
        model = random_decoder(ops, TINY_MODEL, "spq")
        state = DecodeState(ops, TINY_MODEL, 2, 0, 20)
        logits.append([])
        for length in (1, 2, 3):
            state.batch.context_lens_host = [length] * 2  # the reference reads these
            logits[-1].append(decode_step(ops, model, state))
    for got, want in zip(*logits, strict=True):
        assert check_correctness.relative_error(got, want) < FLOAT32_LOGITS


def test_timings_have_their_columns(device, monkeypatch):
    monkeypatch.setattr("kernels.gpu.check_speed._COLD_BYTES", 1)
    ops = TritonOps(device, torch.float16)
    assert copy_bandwidth(device, 1 << 16)["tb_per_s"] > 0
    products = list(int8_products(ops, TINY_MODEL, (1,), 1.0))
    assert [row["name"] for row in products] == ["o", "down", "gate_up", "qkv", "qkv rank 3"]
    attention = list(decode_attention(ops, TINY_MODEL, (1,), (20,), 1.0))
    assert [row["cache"] for row in attention] == ["16-bit", "int8"]
    assert json.dumps([products, attention])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "kernels.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and "CUDA" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    out = tmp_path / "check.json"
    assert gpu_check.main(["--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ok"]
