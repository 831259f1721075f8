"""Packed folders in vLLM: its greedy answers are those of this server. Needs SPQ_VLLM_PYTHON, a Python with vLLM's CPU
build, the plugin and this project (`make test-vllm`); minutes, so it skips by name without.

Both compute in float32 with a float32 cache, by other kernels, so logits differ in their last bits. Answers must be
equal, but where two tokens are as good as one another: the first difference may be one between logits closer than
`TIE`, as transformers computes them from the same folder, and nothing is compared behind it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

import spq  # noqa: F401  # transformers loads packed folders
from spq.compress import compress
from spq.config import SPQConfig
from tests.integrations.mixes import make_mix
from tests.server.harness import Harness
from tests.server.models import SMALL, real_model
from tests.server.program import end, start
from tests.sources import ROOT

PYTHON = os.environ.get("SPQ_VLLM_PYTHON")
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="SPQ_VLLM_PYTHON names no Python with vLLM: make test-vllm"),
    pytest.mark.slow,
]
TIE = 1e-3  # of logits whose standard deviation is 1 and more
NEW_TOKENS = 64
SECONDS = 900
TEXTS = (
    "It was a cold and rainy night, and",
    "The captain looked at the sea and said,",
    "Once upon a time",
    '"Where is',
)
VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
MIXES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"coded": True},
    "llama-bias": {},
    "llama-llama3": {},
    "llama-yarn": {},
    "llama-linear": {},
    "mistral": {},
    "qwen2": {"intermediate_size": 150},  # no multiple of 8, which vLLM's SiLU needs
    "qwen3": {"head_dim": 32},
}


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPQ_", "VLLM_", "PYTHONPATH"))}
    return kept | VLLM | more


def run_jobs(folder: Path, jobs: list[dict[str, Any]], **more: str) -> list[dict[str, Any]]:
    """What `vllm_run` makes of the jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_run.py")), "jobs.json", "results.json"]
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text("utf-8"))
    return results


def job(folder: Path, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    return {"folder": str(folder), "prompts": prompts, "max_tokens": NEW_TOKENS, "options": options}


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, SMALL["vocab_size"], (n,), generator=generator).tolist() for n in (5, 1, 40, 70)]


def ours(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The answers of this server's engine, float32 cache."""
    harness = Harness(folder)
    sequences = harness.run([harness.sequence(p, str(i), max_tokens=NEW_TOKENS) for i, p in enumerate(prompts)])
    return [sequence.token_ids[len(prompt) :] for prompt, sequence in zip(prompts, sequences, strict=True)]


def check_equal(folder: Path, prompts: list[list[int]], found: list[list[int]], expected: list[list[int]]) -> None:
    """Raises AssertionError where answers differ by more than a tie."""
    assert len(found) == len(expected) == len(prompts)
    for prompt, mine, theirs in zip(prompts, expected, found, strict=True):
        assert len(mine) == len(theirs) == NEW_TOKENS
        if mine == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + mine[:at]])).logits[0, -1]
        gap = float(logits[mine[at]] - logits[theirs[at]])
        text = f"token {at}: {mine[at]} here, {theirs[at]} in vLLM, logits {gap} apart"
        assert abs(gap) < TIE, text
        warnings.warn(f"a tie, {text}", stacklevel=1)


def test_a_difference_that_is_no_tie_is_found(tmp_path: Path) -> None:
    folder, prompts = make_mix(tmp_path, "llama"), random_prompts()[:1]
    expected = ours(folder, prompts)
    wrong = [[*expected[0][:20], (expected[0][20] + 1) % 200, *expected[0][21:]]]
    with pytest.raises(AssertionError, match="token 20: "):
        check_equal(folder, prompts, wrong, expected)


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_mix(tmp_path_factory.mktemp(family), family, **options) for family, options in MIXES.items()}


@pytest.fixture(scope="module")
def answers(mixes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of all mixes, by one process."""
    jobs = [job(folder, random_prompts()) for folder in mixes.values()]
    results = run_jobs(tmp_path_factory.mktemp("jobs"), jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return dict(zip(mixes, results, strict=True))


@pytest.mark.parametrize("family", MIXES)
def test_every_kind_of_matrix_in_every_family_answers_as_here(
    family: str, mixes: dict[str, Path], answers: dict[str, dict[str, Any]]
) -> None:
    assert "error" not in answers[family], answers[family]
    prompts = random_prompts()
    check_equal(mixes[family], prompts, answers[family]["tokens"], ours(mixes[family], prompts))


@pytest.mark.parametrize("family", MIXES)
def test_matrices_stay_as_small_as_they_are_here(
    family: str, mixes: dict[str, Path], answers: dict[str, dict[str, Any]]
) -> None:
    here = Harness(mixes[family], backend="auto").bytes.total
    found = answers[family]["product_bytes"] + answers[family]["parameter_bytes"]
    assert 0.9 * here < found < 1.1 * here + 64 * 128  # rows that fill the vocabulary up to a multiple of 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, compressed by the default preset."""
    source = real_model("demo")
    assert source is not None
    out = tmp_path_factory.mktemp("demo") / "storyteller"
    text = (ROOT / "demo" / "calibration.txt").read_text("utf-8")
    compress(source, out, SPQConfig.preset("default"), calibration_text=text, device=torch.device("cpu"))
    return out


def test_two_ranks_answer_as_one(mixes: dict[str, Path], demo: Path, tmp_path: Path) -> None:
    """Two processes with gloo; every split of a matrix of every kind is in the two models."""
    prompts = random_prompts()
    folders = [demo, mixes["llama-bias"]]
    results = run_jobs(tmp_path, [job(folder, prompts, tensor_parallel_size=2) for folder in folders])
    for folder, result in zip(folders, results, strict=True):
        assert "error" not in result, result
        check_equal(folder, prompts, result["tokens"], ours(folder, prompts))


def test_a_compiled_model_answers_alike(demo: Path, tmp_path: Path) -> None:
    """By torch.compile, vLLM's default, which needs a C++ compiler on a CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: torch cannot compile for a CPU")
    prompts = random_prompts()
    options = {"enforce_eager": False}
    (result,) = run_jobs(tmp_path, [job(demo, prompts, **options)], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "error" not in result, result
    check_equal(demo, prompts, result["tokens"], ours(demo, prompts))


def complete(url: str, model: str, prompt: str) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_the_demo_model_answers_over_http_as_from_this_server(demo: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = f"--served-model-name demo --host 127.0.0.1 --port {port} --dtype float32 --max-model-len 512".split()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo), *flags, "--enforce-eager"]
    with (tmp_path / "vllm.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            await_health(process, url, tmp_path / "vllm.log")
            with ThreadPoolExecutor(len(TEXTS)) as pool:
                theirs = list(pool.map(lambda text: complete(url, "demo", text), TEXTS))
        finally:
            process.terminate()
            process.wait(60)
    server = start(demo, tmp_path / "cache", "--kv-dtype", "float32", "--served-model-name", "demo")
    try:
        mine = [complete(server.url, "demo", text) for text in TEXTS]
    finally:
        end(server)
    for here, there in zip(mine, theirs, strict=True):
        assert here["prompt_token_ids"] == there["prompt_token_ids"]
    prompts = [answer["prompt_token_ids"] for answer in mine]
    check_equal(demo, prompts, [a["token_ids"] for a in theirs], [a["token_ids"] for a in mine])
    same = [(a["text"], b["text"]) for a, b in zip(mine, theirs, strict=True) if a["token_ids"] == b["token_ids"]]
    assert same and all(a == b for a, b in same)


def await_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text("utf-8")[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not come up in {SECONDS} s")


def edited(folder: Path, out: Path, **fields: Any) -> Path:
    """A copy with other fields in config.json; those of quantization_config by `quantization_config__NAME`."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text("utf-8"))
    for name, value in fields.items():
        owner, _, key = name.rpartition("__")
        (config[owner] if owner else config)[key] = value
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


def test_what_is_not_served_is_refused_by_name(mixes: dict[str, Path], tmp_path: Path) -> None:
    llama = mixes["llama"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    cut = edited(llama, tmp_path / "cut")
    with (cut / "model.safetensors").open("rb+") as file:
        file.truncate((cut / "model.safetensors").stat().st_size - 100)
    cases = [
        (
            job(edited(llama, tmp_path / "rope", rope_parameters=rope), [[3]]),
            "rope_type 'dynamic': vLLM computes other",
        ),
        (job(edited(llama, tmp_path / "act", hidden_act="gelu"), [[3]]), "hidden_act 'gelu'"),
        (
            job(edited(llama, tmp_path / "version", quantization_config__format_version=9), [[3]]),
            "packed format version 9",
        ),
        (job(cut, [[3]]), "cut short"),
        (job(llama, [[3]], enable_lora=True), "LoRA on spq weights is not supported"),
    ]
    results = run_jobs(tmp_path, [case for case, _ in cases], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for result, (_, reason) in zip(results, cases, strict=True):
        assert reason in result["error"], (reason, result)
