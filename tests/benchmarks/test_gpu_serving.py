"""The GPU-day program on a CPU: it runs, its bars are computed from the right rows, and what fails is named alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_rivals, gpu_serving
from benchmarks.gpu_bars import judged, markdown
from benchmarks.gpu_models import SHAPES, SMALL, write_model
from benchmarks.gpu_parts import MODELS, RIVALS, Part, PartFailed, PartSkipped, Workshop, all_parts
from benchmarks.gpu_servers import Load, Served, decoding_rate, measure_server, summarize
from benchmarks.gpu_serving import LEAST_S, RIVALS_SHARE, new_report, run_parts
from loadtest.client import Wave
from loadtest.process import NotReady
from loadtest.stream import Answer
from spq.checkpoint import open_model
from spq.tensorfile import locate_tensors

ROOT = Path(__file__).resolve().parents[2]
LOAD = Load((1, 64), 768, 256, 2)
CPU = torch.device("cpu")


def answer(first_s: float, gaps_s: list[float], tokens: int | None = None) -> Answer:
    chunks = len(gaps_s) + 1
    return Answer(first_s, gaps_s, chunks, prompt_tokens=4, completion_tokens=tokens or chunks)


def test_time_per_token_has_no_prompt_in_it() -> None:
    figures = summarize([Wave([answer(9.0, [0.01, 0.02, 0.03])], spent_s=10.0, new_tokens=4)])
    assert figures["ms_per_token"] == pytest.approx(20.0)
    assert figures["ttft_p50_ms"] == 9000.0 and figures["tokens_per_s"] == pytest.approx(0.4)


def test_time_per_token_counts_tokens_and_not_chunks() -> None:
    figures = summarize([Wave([answer(1.0, [0.04, 0.04], tokens=5)], spent_s=2.0, new_tokens=5)])
    assert figures["ms_per_token"] == pytest.approx(20.0) and figures["chunks_per_token"] == pytest.approx(0.6)


def test_the_rate_of_a_batch_is_that_of_the_time_when_all_decode() -> None:
    early, late = answer(1.0, [0.5] * 6), answer(2.0, [0.25] * 6)  # until 4.0 and until 3.5: together from 2.0 to 3.5
    assert decoding_rate(Wave([early, late], 4.0, 7)) == pytest.approx((3 + 6) / 1.5)
    assert decoding_rate(Wave([answer(1.0, [0.1]), answer(5.0, [0.1])], 6.0, 2)) is None


def part(system: str, rows: list[dict[str, Any]], status: str = "ok", reason: str | None = None) -> dict[str, Any]:
    rows = [{"system": system} | row for row in rows]
    return {
        "part": f"LLaMA-2-7B/{system}", "model": "LLaMA-2-7B", "systems": [system], "status": status, "reason": reason,
        "rows": rows,
    }  # fmt: skip


def speed(batch: int, ms: float, rate: float, **more: Any) -> dict[str, Any]:
    return {"kind": "speed", "batch": batch, "ms_per_token": ms, "decode_tokens_per_s": rate, "tokens_per_s": rate / 2,
            **more}  # fmt: skip


def report(gpu: str | None, parts: list[dict[str, Any]], gemm: list[float]) -> dict[str, Any]:
    rows = [
        {"model": "m", "name": "o", "rows": m, "tb_per_s": x} for m, x in zip((1, 4, 16, 64), [*gemm, 0.1], strict=True)
    ]
    found = new_report({"gpu": gpu, "torch": "2"}, LOAD, "LLaMA-2-7B")
    found |= {"parts": parts, "kernels": {"sections": {"gemm": [{"rows": rows}]}}}
    found["bars"] = judged(found)
    return found


GOOD = [
    part("ours spq", [speed(1, 2.8, 357.0), speed(64, 10.0, 6400.0),
                      {"kind": "memory", "bytes_packed": 5_600, "bytes_ready": 40_000},
                      {"kind": "memory", "bytes_loaded": 5_700, "bytes_packed": 5_600}]),
    part("ours spq 16-bit KV", [speed(64, 16.0, 4000.0)]),
    part("ours fp16", [speed(1, 5.1, 196.0)]),
    part("gptqmodel-8", [speed(1, 9.0, 111.0, mode="graph"), speed(1, 3.3, 303.0, mode="compile"),
                         {"kind": "speed", "batch": 64, "mode": "graph", "failed": "OutOfMemoryError"},
                         {"kind": "memory", "bytes_loaded": 7_100}]),
]  # fmt: skip


def test_bars_are_judged_on_an_h100() -> None:
    bars = judged(report("NVIDIA H100 80GB HBM3", GOOD, [2.4, 2.2, 2.1]))
    assert [bar["verdict"] for bar in bars] == ["met"] * 7
    values = [bar["value"] for bar in bars]
    assert values == pytest.approx([2.1, 2.8, 5.1 / 2.8, 3.3 / 2.8, 1.6, 1 / 56, 7100 / 5700])
    heavy = {"kind": "memory", "bytes_loaded": 7_200, "bytes_packed": 5_600}
    slow = [part("ours spq", [speed(1, 2.95, 1.0), speed(64, 1.0, 5900.0), heavy]), *GOOD[1:]]
    assert [bar["verdict"] for bar in judged(report("NVIDIA H100", slow, [2.4, 2.2, 1.9]))] == ["missed"] * 7


def test_no_bar_is_met_elsewhere_and_what_is_missing_says_why() -> None:
    gone = part("gptqmodel-8", [], "skipped", "the package gptqmodel is not installed")
    died = part("ours fp16", [], "failed", "NotReady: exit code 1")
    bars = judged(report("NVIDIA H200", [*GOOD[:2], died, gone], [2.4, 2.2, 2.1]))
    assert not {"met", "missed"} & {bar["verdict"] for bar in bars}
    assert "not run on an H100 (this is NVIDIA H200)" in {bar["verdict"] for bar in bars}
    verdicts = {bar["bar"]: bar["verdict"] for bar in bars}
    assert any("fp16" in name and "exit code 1" in text for name, text in verdicts.items())
    assert sum("gptqmodel is not installed" in text for text in verdicts.values()) == 2
    nothing = judged({**report(None, [], [1.0] * 3), "kernels": None})
    assert all(bar["verdict"].startswith("not run: ") for bar in nothing) and len(nothing) == 7


def test_the_tables_hold_every_bar_row_and_failure() -> None:
    failed = part("torchao-int8", [], "failed", "OutOfMemoryError: 1 GiB\nof 80")
    text = markdown(report("NVIDIA H100", [*GOOD, failed], [2.4, 2.2, 2.1]))
    assert text.count("| met |") == 7 and "| gptqmodel-8 graph | 64 | OutOfMemoryError |" in text
    assert "| LLaMA-2-7B/torchao-int8 | failed | OutOfMemoryError: 1 GiB of 80 |" in text
    assert "| LLaMA-2-7B | ours spq | 5.6e-06 | 5.7e-06 |  | 4e-05 |  |" in text, "readings of a system in one row"


def test_the_plan_begins_with_what_bars_need() -> None:
    parts = all_parts(MODELS, (1, 8, 32, 64), "bfloat16")
    names = [p.name for p in parts]
    assert len(names) == len(set(names)) == 2 * (4 + len(RIVALS))
    assert names[:5] == [f"LLaMA-2-7B/{s}" for s in
                         ("ours spq", "ours spq 16-bit KV", "ours fp16", "ours int8", "gptqmodel-8")]  # fmt: skip
    assert parts[1].levels == (64,) and parts[4].levels == (1, 64, 8, 32)


def run(parts: list[Part], found: dict[str, Any], runner: gpu_serving.Runner, limit_s: float = 1000.0) -> int:
    saved = []
    run_parts(parts, runner, found, time.monotonic() + limit_s, lambda: saved.append(json.dumps(found)))
    return len(saved)


def test_a_part_that_breaks_is_named_and_the_rest_goes_on() -> None:
    def runner(p: Part, deadline: float) -> Iterator[dict[str, Any]]:
        yield {"kind": "speed", "system": p.system}
        for name, error in (("a", RuntimeError("it died")), ("b", PartSkipped("no package")),
                            ("c", TimeoutError()), ("d", PartFailed("exit status 1"))):  # fmt: skip
            if p.system == name:
                raise error

    found = new_report({}, LOAD, "m")
    parts = [Part("m", system, "spq") for system in "abcde"]
    assert run(parts, found, runner) == 6, "saved after every part"
    states = [(entry["status"], entry["reason"]) for entry in found["parts"]]
    assert states[0] == ("failed", "RuntimeError: it died") and states[1] == ("skipped", "no package")
    assert states[2][0] == "failed" and "time limit" in states[2][1] and states[4] == ("ok", None)
    assert all(len(entry["rows"]) == 1 for entry in found["parts"]), "rows that came before are kept"
    tried = []

    def again(p: Part, deadline: float) -> Iterator[dict[str, Any]]:
        tried.append(p.system)
        yield {"kind": "speed", "system": p.system}

    run([parts[0], *parts[2:]], found, again)
    assert tried == ["a", "c", "d"] and {entry["status"] for entry in found["parts"]} == {"ok", "skipped"}


def test_the_time_limit_is_respected_and_shared_with_rivals() -> None:
    limits = []

    def runner(p: Part, deadline: float) -> Iterator[dict[str, Any]]:
        limits.append(deadline - time.monotonic())
        yield {}

    found = new_report({}, LOAD, "m")
    run([Part("m", "ours", "spq"), Part("m", "rival", None, package="x")], found, runner, 100.0)
    assert limits == pytest.approx([100.0, 100.0 * RIVALS_SHARE], abs=2.0)
    found = new_report({}, LOAD, "m")
    run([Part("m", "ours", "spq")], found, runner, LEAST_S / 2)
    assert len(limits) == 2 and found["parts"][0]["status"] == "not run"
    assert "time limit" in found["parts"][0]["reason"]


def test_a_rival_that_is_not_installed_is_skipped_by_name(tmp_path: Path) -> None:
    absent = Part("small", "x-8", "gptq8", package="no_such_package")
    with pytest.raises(PartSkipped, match="no_such_package"):
        list(Workshop(tmp_path, "cpu", LOAD, {}).run(absent, time.monotonic() + 1))


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    served = Served("ours", tmp_path / "nowhere", ("--no-such-flag",))
    with pytest.raises(NotReady, match="no-such-flag"):
        list(measure_server(served, LOAD, os.environ, tmp_path / "log", time.monotonic() + 60))


@pytest.mark.parametrize("kind", ["spq", "int8", "fp16", "gptq8", "gptq4"])
def test_random_models_are_what_they_say(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    size = write_model(folder, SMALL, kind, CPU)
    tensors = locate_tensors(folder)
    assert sum(info.nbytes for info in tensors.values()) == size
    config = json.loads((folder / "config.json").read_text())
    if kind.startswith("gptq"):
        words = tensors["model.layers.1.mlp.down_proj.qweight"]
        assert words.shape == (SMALL.width * config["quantization_config"]["bits"] // 32, SMALL.hidden)
    else:
        manifest = open_model(folder).manifest
        assert (manifest is None) == (kind == "fp16")
        ranks = {plan.rank for plan in manifest.modules.values()} if manifest else {None}
        assert ranks == ({None, SMALL.rank, SMALL.kv_rank} if kind == "spq" else {None})
    assert SHAPES["LLaMA-2-7B"].vocab == 32000


def test_a_rival_gives_rows_and_a_batch_that_fails_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_rivals.StaticBatch.prefill
    monkeypatch.setattr(gpu_rivals.StaticBatch, "prefill", lambda self: right(self) if len(self.token) == 1 else 1 / 0)
    memory, good, bad, _ = gpu_rivals.run_rival("transformers-fp16", SMALL, None, Load((1, 2), 6, 4, 2), CPU)
    assert memory["kind"] == "memory" and memory["bytes_before"] > 0
    assert good["batch"] == 1 and good["decode_tokens_per_s"] == pytest.approx(1e3 / good["ms_per_token"])
    assert bad["batch"] == 2 and "ZeroDivisionError" in bad["failed"] and "ms_per_token" not in bad


def test_a_static_batch_decodes_what_generate_does() -> None:
    model, _ = gpu_rivals.load_model("transformers-fp16", SMALL, None, CPU)
    batch = gpu_rivals.StaticBatch(model, SMALL, 2, Load((2,), 6, 4, 1), CPU)
    with torch.no_grad():
        batch.prefill()
        step, tokens = batch.step("eager"), [batch.token.clone()]
        for _ in range(3):
            step()
            tokens.append(batch.token.clone())
        want = model.generate(batch.prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(tokens, 1), want[:, 6:])


@pytest.mark.program
@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="needs a rival that is not installed")
def test_the_program_runs(tmp_path: Path) -> None:
    out, table, kernels = (tmp_path / name for name in ("out.json", "out.md", "kernels.json"))
    kernels.write_text(json.dumps({"sections": {"gemm": []}}))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_serving", "--small", "--json", str(out), "--markdown", str(table),
         "--kernels", str(kernels), "--levels", "1,3", "--prompt-tokens", "12", "--new-tokens", "8", "--rounds", "1",
         "--parts", "ours int8,torchao-int8", "--cache-dir", str(tmp_path), "--time-limit", "1000"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    ours, rival = found["parts"]
    assert (rival["part"], rival["status"]) == ("small/torchao-int8", "skipped") and "torchao" in rival["reason"]
    assert (ours["part"], ours["status"], ours["reason"]) == ("small/ours int8", "ok", None)
    speeds = [row for row in ours["rows"] if row["kind"] == "speed"]
    assert [row["batch"] for row in speeds] == [1, 3]
    assert all(row["ms_per_token"] > 0 and row["tokens_per_s"] > 0 for row in speeds)
    served, loaded = (row for row in ours["rows"] if row["kind"] == "memory")
    assert served["bytes_full_kv"] > 0 and loaded["bytes_loaded"] > 0
    assert served["bytes_packed"] == loaded["bytes_packed"] > 2e6
    assert len(found["bars"]) == 7 and found["date_utc"] and "| bar |" in table.read_text()
    assert list(tmp_path.glob("gpu-serving-*")) == [], "models are removed"


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_serving, "_environment", lambda limit_s: {"torch": "2"})
    assert gpu_serving.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "CUDA" in capsys.readouterr().err
