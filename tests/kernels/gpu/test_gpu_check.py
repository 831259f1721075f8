"""The GPU check in Triton's interpreter: every part runs, a wrong kernel fails, a broken part stays alone."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import gpu_check
from kernels.gpu import check_correctness, check_part
from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import CorrectnessChecks, relative_error
from kernels.gpu.check_decode import VARIANTS, DecodeState, decode_step, random_decoder
from kernels.gpu.check_products import ProductCase, product_cases
from kernels.gpu.check_tune import candidates
from kernels.gpu.configs import MULTIPROCESSORS, ROW_BUCKETS, tile_config
from kernels.gpu.plan import LLAMA_2_7B, TINY_MODEL
from kernels.reference import ReferenceOps

ROOT = Path(__file__).resolve().parents[3]
FLOAT32_LOGITS = 1e-5  # a few hundred float32 operations between embedding and logits


@pytest.fixture
def settings(device, monkeypatch):
    monkeypatch.setattr("kernels.gpu.check_speed._COLD_BYTES", 1)
    return check_part.Settings(device, small=True, warm=False, copy_tb_per_s=1.0)


def run(part, settings):
    return list(check_part.rows_of(part, settings))


def test_names_of_parts_are_those_of_what_they_run(device):
    groups = CorrectnessChecks(device, torch.float16, check_correctness.TINY).groups()
    assert [part.split("/", 2)[2] for part in check_part.parts("correctness")] == [*groups, *groups]
    products = [case.name for case in product_cases(TritonOps(device, torch.float16), TINY_MODEL)]
    assert [part.split("/", 2)[2] for part in check_part.parts("tune")] == products
    assert [part.split("/", 2)[2] for part in check_part.parts("decode")] == [*VARIANTS, *VARIANTS]


@pytest.mark.parametrize("part", [part for part in check_part.parts("correctness") if "/float16/" in part])
def test_every_operation_passes(part, settings):
    rows = run(part, settings)
    assert rows and [row for row in rows if not row["ok"]] == []


def test_a_wrong_kernel_fails_and_a_broken_one_is_a_failed_check(settings, monkeypatch):
    right = TritonOps.rms_norm
    monkeypatch.setattr(TritonOps, "rms_norm", lambda *a: right(*a) * 1.01)
    monkeypatch.setattr(TritonOps, "embed", lambda *a: 1 / 0)
    assert not any(row["ok"] for row in run("correctness/float16/norms", settings))
    (row,) = run("correctness/float16/embed", settings)
    assert not row["ok"] and "ZeroDivisionError" in row["detail"]


@pytest.mark.parametrize("part", ["environment", "bandwidth", "gemm/tiny", "attention/tiny", "decode/tiny/spq"])
def test_every_measurement_runs(part, settings):
    rows = run(part, settings)
    assert json.dumps(rows)
    if part.startswith("gemm"):
        cases = list(product_cases(TritonOps(settings.device, torch.float16), TINY_MODEL))
        assert [row["prefill"] for row in rows if "prefill" in row] == ["o", "down"]
        rows = [row for row in rows if "name" in row]
        assert [row["name"] for row in rows if row["rows"] == 1] == [case.name for case in cases]
        assert {row["name"] for row in rows if row["rows"] > 64} == {case.name for case in cases if case.takes(65)}
    if part.startswith("attention"):
        assert [row["cache"] for row in rows] == ["16-bit", "int8"]
    if part.startswith("decode"):
        assert [row["batch"] for row in rows if "eager_tokens_per_s" in row] == [1, 5]
        assert sum("operation" in row for row in rows) == 6


@pytest.mark.parametrize("part", ["decode/tiny/int8"])
def test_warming_measures_nothing(part, settings):
    rows = run(part, check_part.Settings(settings.device, small=True, warm=True, copy_tb_per_s=1.0))
    assert rows and not any("eager_tokens_per_s" in row for row in rows)


def test_tuning_tries_other_tiles_and_survives_those_that_fail(settings, monkeypatch):
    monkeypatch.setattr("kernels.gpu.check_tune.candidates", lambda case, rows, current, arch: [current, "broken"])
    monkeypatch.setattr("kernels.gpu.check_tune.ROW_BUCKETS", (4, 16))
    rows = run("tune/tiny/o + residual", settings)
    assert [row["rows_up_to"] for row in rows] == [4, 16]
    assert all(row["tried"] == 1 and "AttributeError" in row["failed"][0] for row in rows)


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_the_grid_of_tuning_is_small_and_fits(arch, device):
    for case in product_cases(TritonOps(device, torch.float16), TINY_MODEL):
        shape = LLAMA_2_7B
        big = ProductCase(case.name, case.kernel, shape.hidden, shape.hidden, 0, 0, case.prepare, case.run)
        for rows in ROW_BUCKETS:
            current = tile_config(case.kernel, rows, big.n, big.k, torch.float16, arch)
            tiles = candidates(big, rows, current, arch)
            assert tiles[0] == current and 4 <= len(tiles) <= 12 and len(set(tiles)) == len(tiles)
            assert all(big.k % tile.block_k == 0 and tile.block_m == current.block_m for tile in tiles)


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
        assert relative_error(got, want) < FLOAT32_LOGITS


SCRIPT = """
import sys, time, json
name = sys.argv[-1]
if name[0] != "c": print(json.dumps({"part": name, "tb_per_s": 2.0, "options": sys.argv[1:-1]}), flush=True)
if name == "gemm/slow": time.sleep(60)
if name == "gemm/bad": sys.exit("out of memory")
if name == "correctness/wrong": print(json.dumps({"ok": False, "error": 2.0, "limit": 1.0}))
if name == "correctness/right": print(json.dumps({"ok": True, "error": 0.5, "limit": 1.0}))
"""


def test_parts_that_break_or_hang_lose_no_other(capsys, monkeypatch):
    limited = partial(gpu_check.run_part, timeout_s=3.0)
    monkeypatch.setattr(gpu_check, "run_part", lambda command, name, timeout_s: limited(command, name))
    command = [sys.executable, "-c", SCRIPT]
    check = gpu_check.Check(["bandwidth", "correctness", "gemm"], command, time_limit_s=100, jobs=4)
    parts = {"bandwidth": ["bandwidth"], "gemm": ["gemm/bad", "gemm/slow", "gemm/late"]}
    check.run({"correctness": ["correctness/right", "correctness/wrong"], **parts})
    gemm = {part.name: part for part in check.sections["gemm"]}
    assert "out of memory" in gemm["gemm/bad"].error and len(gemm["gemm/bad"].rows) == 1
    assert "stopped" in gemm["gemm/slow"].error and len(gemm["gemm/slow"].rows) == 1
    assert gemm["gemm/late"].ok and gemm["gemm/late"].rows[0]["options"] == ["--copy", "2.0"]
    assert [part.ok for part in check.sections["correctness"]] == [True, False] and not check.ok
    report = check.as_json()
    assert json.loads(json.dumps(report)) == report
    text = gpu_check.markdown(report)
    assert "## gemm" in text and "stopped after" in text and "| correctness/wrong | 1 | 1 | 2 |  |" in text
    assert "gemm/slow: FAILED" in capsys.readouterr().out


def test_what_does_not_fit_the_time_limit_is_not_started():
    check = gpu_check.Check(["bandwidth"], [sys.executable, "-c", SCRIPT], time_limit_s=0.0, jobs=1)
    check.run({name: ["bandwidth"] if name == "bandwidth" else [] for name in gpu_check.SECTIONS})
    assert "time limit" in check.sections["bandwidth"][0].error


def test_the_sanitizer_watches_everything_and_says_where_it_is_missing(tmp_path, monkeypatch):
    watched = gpu_check.sanitizer_parts()
    assert {part for tool, part in watched if tool == "memcheck"} == set(check_part.parts("correctness"))
    assert {part.split("/")[2] for tool, part in watched if tool == "racecheck"} == set(gpu_check._SHARING)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = gpu_check.Check(["sanitizer"], [sys.executable, "-c", SCRIPT], time_limit_s=100, jobs=4)
    check.run({name: [] for name in gpu_check.SECTIONS})
    assert check.ok and len(check.sections["sanitizer"]) == len(watched)
    assert "| compute-sanitizer is not on the PATH |" in gpu_check.markdown(check.as_json())


def test_what_the_sanitizer_finds_fails(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho \'{"ok": true, "limit": 1.0, "error": 0.5}\'\n'
        'echo "= Invalid write $2 $PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit $4\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(gpu_check, "sanitizer_parts", lambda: [("racecheck", "correctness/float16/embed")])
    check = gpu_check.Check(["sanitizer"], ["python"], time_limit_s=100, jobs=1)
    check.run({name: [] for name in gpu_check.SECTIONS})
    (part,) = check.sections["sanitizer"]
    assert not check.ok and len(part.rows) == 1
    assert "exit status 9" in part.error and "Invalid write racecheck 1" in part.error


def test_the_serving_benchmark_is_started_with_the_time_that_is_left(monkeypatch):
    commands = []

    def run_part(command, name, timeout_s):
        commands.append([*command, name])
        kernels = json.loads(Path(command[command.index("--kernels") + 1]).read_text())
        assert list(kernels["sections"]) == ["gemm", "serving"]
        Path(name).write_text(json.dumps({"bars": [{"bar": "x", "verdict": "met"}], "parts": []}))
        Path(command[command.index("--markdown") + 1]).write_text("tables")
        return gpu_check.Part(name)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    check = gpu_check.Check(["gemm", "serving"], [], time_limit_s=100, jobs=1)
    check.serve(["--small"])
    (command,) = commands
    assert 0 < float(command[command.index("--time-limit") + 1]) <= 100 - gpu_check._CLOSING_S
    assert "--small" in command and command[1:3] == ["-m", "benchmarks.gpu_serving"]
    report = check.as_json()
    assert report["serving"]["bars"] == report["sections"]["serving"][0]["rows"] and check.ok
    assert check.serving_tables == "tables" and "| bar |" not in gpu_check.markdown(report)
    late = gpu_check.Check(["serving"], [], time_limit_s=1, jobs=1)
    late.serve([])
    assert len(commands) == 1 and "time limit" in late.sections["serving"][0].error


def test_a_part_is_asked_to_end_before_it_is_killed(tmp_path):
    ended = tmp_path / "ended"
    script = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[-1]).touch(), sys.exit(1)))\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(ended)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    gpu_check._end(process)
    assert ended.exists() and process.returncode == 1


def test_a_part_is_a_process_of_its_own(device):
    command = [sys.executable, "-m", "kernels.gpu.check_part", "--small"]
    part = gpu_check.run_part(command, "correctness/float16/norms", 120)
    assert part.ok and part.rows[0]["name"] == "rms_norm"
    assert "KeyError" in gpu_check.run_part(command, "nonsense", 120).error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "kernels.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and "CUDA" in result.stderr


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--sections", "gemm,gem"])
    assert "['gem']" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    out, table = tmp_path / "check.json", tmp_path / "check.md"
    sections = "environment,correctness,sanitizer,bandwidth,gemm,attention,decode,serving"
    arguments = ["--small", "--sections", sections, "--out", str(out), "--markdown", str(table)]
    assert gpu_check.main(arguments) == 0
    assert json.loads(out.read_text())["ok"] and "## gemm" in table.read_text()
