"""A server process that sleeps: its memory goes back to the system, and signals end it whatever its model does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import random_model, real_model
from program import Server, end, start

from spq.manifest import ModulePlan
from tests.packed import write_packed

MIB = 1024**2
OPERATOR = {"Authorization": "Bearer operator"}


def admin(server: Server, action: str) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/admin/{action}", headers=OPERATOR, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def complete(server: Server) -> httpx.Response:
    body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MiB of int8 weights."""
    folder = tmp_path_factory.mktemp("wide")
    random_model(
        "llama", vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    ).bfloat16().save_pretrained(folder / "source")  # fmt: skip
    demo = real_model("demo")
    assert demo is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).write_bytes((demo / name).read_bytes())

    def int8(name: str, shape: tuple[int, int]) -> ModulePlan:
        return ModulePlan(kind="int8", shape=shape)

    return write_packed(folder / "source", folder / "packed", int8)


def test_memory_goes_back_to_the_system_and_comes_again(packed: Path, tmp_path: Path) -> None:
    server = start(packed, tmp_path, "--admin-key", "operator", "--kv-memory", "32MiB", "--served-model-name", "m")
    try:
        first = complete(server).json()["choices"][0]["text"]
        awake = resident(server)
        given_back = server.metric("spq:memory_bytes", kind="weights") + server.metric("spq:memory_bytes", kind="kv")
        assert given_back > 100 * MIB
        for _ in range(2):
            admin(server, "sleep")
            asleep = resident(server)
            assert awake - asleep > 0.9 * given_back, f"{awake / MIB:.0f} MiB awake, {asleep / MIB:.0f} asleep"
            assert complete(server).json()["choices"][0]["text"] == first
            assert abs(resident(server) - awake) < 0.15 * awake
    finally:
        status, log = end(server)
    assert status == 0 and "Traceback" not in log, log


def test_signals_end_it_asleep_and_while_it_wakes(tmp_path: Path) -> None:
    model = real_model("demo")
    assert model is not None
    options = ("--served-model-name", "m", "--preset", "none", "--sleep-idle-seconds", "0.3", "--kv-memory", "8MiB")
    for is_waking in (False, True):
        server = start(model, tmp_path, *options)
        until_phase(server, "sleeping")
        answers: list[httpx.Response] = []
        client = threading.Thread(target=ask, args=(server, answers))
        if is_waking:
            client.start()
            until_phase(server, "loading", "warming_up", "ready")
        status, log = end(server)
        assert status == 0 and "Traceback" not in log, log
        if is_waking:
            client.join(30)
            [answer] = answers
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "draining", answer.text


def until_phase(server: Server, *phases: str) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{server.url}/ready").json()["phase"] not in phases:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(server: Server, answers: list[httpx.Response]) -> None:
    answers.append(complete(server))
