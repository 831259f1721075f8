"""`python -m loadtest.compare` as a whole: a server that it starts beside one that runs, with other weights."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from live import serve
from locusts import ROOT, scripted

from loadtest.compare import main
from loadtest.report import Results

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
LOAD = ("--levels", "1,3", "--prompt-tokens", "20", "--new-tokens", "6", "--attempts", "1", "--max-others", "99",
        "--threads", "1")  # fmt: skip


def compare(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest.compare", "--model", "demo/storyteller", "--out", str(out), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_servers_from_the_load_to_the_report(tmp_path: Path) -> None:
    out = tmp_path / "report"
    with serve(max_num_seqs=8) as live:
        given = ("--server", f"live={live.url}", "--cache", str(tmp_path / "cache"), *LOAD)
        done = compare(out, "--servers", "ours", *given, "--rounds", "2", "--subject", "live", "--bits", "live=32")
        assert done.returncode == 0, done.stderr
        found = Results.load(out)
        taken = [(turn.round, turn.server, turn.streams) for turn in found.turns]
        assert taken == [(r, name, n) for r in (1, 2) for name in ("ours", "live") for n in (1, 3)], "A B A B"
        for one, other in zip(found.turns[:2], found.turns[2:4], strict=True):
            assert one.work is not None and other.work is not None
            assert one.work.prompts == other.work.prompts and one.work.counted_tokens == other.work.new_tokens
            assert one.work.prompt_tokens == 20 * one.work.requests
        assert found.turns[0].cpu_s_per_token and found.turns[2].cpu_s_per_token is None, "not ours to watch"
        assert sum(found.turns[1].arrivals) == 3 * 6
        assert found.memory["ours"].kinds["data"] > 0 and found.memory["ours"].ledger["weights"] > 0
        assert found.memory["live"].ledger["weights"] > found.memory["ours"].ledger["weights"]
        assert "- live beside ours: " in done.stdout and "of 32 and 8 bits" in done.stdout
        assert {path.name for path in out.iterdir()} >= {"report.md", "report.html", "memory.png", "results.json"}

        more = compare(out, *given, "--rounds", "1", "--add", "--device-bytes", "live=1000", "--api-key", "")
        assert more.returncode == 0, more.stderr
        assert Results.load(out).memory["live"].peak_bytes == 1000
        assert [(t.round, t.server) for t in Results.load(out).turns][8:] == [(3, "live"), (3, "live")]
        other_load = compare(out, *given, "--rounds", "1", "--add", "--new-tokens", "7")
        assert other_load.returncode == 2 and "another load" in other_load.stderr

        # the prompts of round 1 again, at a server that keeps them: it would compute less than the other
        cached = compare(tmp_path / "cached", *given, "--rounds", "1")
        assert cached.returncode == 3, cached.stderr
        text = (tmp_path / "cached" / "report.md").read_text()
        assert "prompt tokens came from its cache" in text and "| live |" not in text


def test_one_server_cannot_be_given_other_sampling(tmp_path: Path) -> None:
    with scripted() as (url, _):
        done = compare(tmp_path, "--server", f"live={url}", "--extra", 'live={"temperature": 1}', *LOAD)
    assert done.returncode == 3 and "live alone would get temperature" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--servers", "nobody"), "no server or path of the name 'nobody'"),
        (("--servers", "vllm-float32"), "vllm_python"),
        (("--server", "here"), "write NAME=URL"),
        (("--server", "x=http://127.0.0.1:9"), "v1/models"),
        ((), "no server"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "demo/storyteller", "--out", str(tmp_path), "--cache", str(tmp_path), *arguments])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_who_cannot_start_is_left_out_and_named(tmp_path: Path) -> None:
    false = ("--vllm-python", "/bin/false", "--gptq", "x", "--cache", str(tmp_path))
    done = compare(tmp_path, "--servers", "vllm-float32", *false)
    assert done.returncode == 1 and "vllm-float32 is left out: exit code 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installer_names_its_parts(tmp_path: Path) -> None:
    script = str(ROOT / "loadtest" / "install_rivals.sh")
    usage = subprocess.run(["sh", script], cwd=ROOT, capture_output=True, text=True)
    assert usage.returncode == 2 and "llama.cpp vllm transformers model gguf gptq4" in usage.stderr
    unknown = subprocess.run(["sh", script, str(tmp_path), "nobody"], cwd=ROOT, capture_output=True, text=True)
    assert unknown.returncode == 2 and "no such part" in unknown.stderr
    (tmp_path / ".vllm").touch()
    kept = subprocess.run(["sh", script, str(tmp_path), "vllm"], cwd=ROOT, capture_output=True, text=True)
    assert kept.returncode == 0 and "==" not in kept.stderr, "what is there is not made again"
