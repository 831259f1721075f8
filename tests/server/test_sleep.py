"""Sleep over real sockets: the model goes when nobody asks, and comes back for the next who does."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Live, serve
from models import real_model

from server import startup

REAL = startup.start_up
TEXT = (
    "The captain looked at the sea and at the sky, went down to his men, sat at their table, and after a time he said"
)
CHAT = {"model": "demo", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 0}
COUNTERS = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:generation_tokens_total",
            "vllm:prompt_tokens_total", "vllm:iteration_tokens_total_count")  # fmt: skip


class Gate:
    """Counts loads, and holds them while it is shut."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.is_open = threading.Event()
        self.is_open.set()

    def start_up(self, *arguments: Any, **options: Any) -> Any:
        self.num_loads += 1
        assert self.is_open.wait(60)
        return REAL(*arguments, **options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(startup, "start_up", gate.start_up)
    yield gate
    gate.is_open.set()


def ask(live: Live, **headers: str) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60)


def counters(live: Live) -> list[float]:
    return [live.metric(name) for name in COUNTERS]


def test_an_idle_server_drops_its_model_and_a_chat_brings_it_back(gate: Gate) -> None:
    with serve(sleep_idle_s=4) as live:
        client = live.client()
        first = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
        client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
        [card] = client.models.list().data
        engine = live.service.engine
        assert engine is not None
        model = weakref.ref(engine._loop._runner._model)  # type: ignore[attr-defined]
        page = weakref.ref(engine._loop._runner._cache[0].key)  # type: ignore[attr-defined]
        del engine
        assert live.metric("vllm:engine_sleep_state", sleep_state="awake") == 1
        before = counters(live)
        assert before[1] > 0
        live.until("sleeping")
        gc.collect()
        assert model() is None and page() is None, "weights or cache are still there"
        ready, health = httpx.get(f"{live.url}/ready"), httpx.get(f"{live.url}/health")
        assert (ready.status_code, health.status_code) == (200, 200)
        assert live.metric("vllm:engine_sleep_state", sleep_state="discard_all") == 1
        assert live.metric("vllm:engine_sleep_state", sleep_state="awake") == 0
        assert live.metric("spq:memory_bytes") == 0
        assert counters(live) == before
        assert client.models.list().data == [card]
        load = httpx.get(f"{live.url}/v1/load").json()
        assert (load["num_running"], load["kv_tokens"]) == (0, card.model_extra["spq"]["kv_tokens"])  # type: ignore[index]
        assert httpx.get(f"{live.url}/tokenizer_info").status_code == 200
        assert live.post("/tokenize", prompt="the sea").json()["count"] > 0
        assert live.post("/v1/completions", prompt="x", max_tokens=-1).status_code == 400
        assert live.phase() == "sleeping" and gate.num_loads == 1, "nothing of these may wake it"
        again = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
        assert again.choices[0].message.content == first.choices[0].message.content
        assert gate.num_loads == 2 and live.phase() == "ready"
        after = counters(live)
        assert all(now > then for now, then in zip(after[2:], before[2:], strict=True)), "what is used is counted on"
        assert after[0] > before[0] and after[1] >= before[1]


def test_a_stream_keeps_it_awake(gate: Gate) -> None:
    with serve(sleep_idle_s=0.2) as live:
        body = {"model": "demo", "prompt": "It was", "max_tokens": 800, "ignore_eos": True, "stream": True}
        began_s = seen_s = 0.0
        loads, last = 0, ""
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as response:
            for number, line in enumerate(response.iter_lines()):
                if number == 0:
                    loads, began_s = gate.num_loads, time.monotonic()
                if number % 50 == 0:
                    phase = live.phase()
                    if live.service.door.num_inside:
                        assert phase == "ready"
                        seen_s = time.monotonic()
                last = line or last
        assert last == "data: [DONE]"
        assert seen_s - began_s > 0.4, "shorter than the idle time, it shows nothing"
        live.until("sleeping")
        assert gate.num_loads == loads


def test_requests_at_once_wake_it_once_and_who_leaves_is_forgotten(gate: Gate) -> None:
    with serve(admin_key="operator", max_num_seqs=2, max_queue=1) as live, ThreadPoolExecutor(4) as threads:
        expected = ask(live).json()["choices"]
        assert live.admin("sleep").json()["phase"] == "sleeping"
        gate.is_open.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/chat/completions", json=CHAT, timeout=0.5)
        end = time.monotonic() + 10
        while not live.metric("http_requests_total", status="499"):
            assert time.monotonic() < end, "who has left still waits"
            time.sleep(0.02)
        late = ask(live, **{"X-Request-Timeout": "0.2"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        waiting = [threads.submit(ask, live) for _ in range(3)]  # two would run, one would queue
        while live.service.life._num_waiting < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        refused = ask(live)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{live.url}/ready").status_code == 200, "who sends now is served"
        gate.is_open.set()
        answers = [future.result() for future in waiting]
        assert [answer.json()["choices"] for answer in answers] == [expected] * 3
        assert gate.num_loads == 2


def test_a_busy_server_sleeps_only_when_told_to_wait(gate: Gate) -> None:
    with serve(admin_key="operator", drain_timeout_s=60) as live:
        body = {"model": "demo", "prompt": "It was", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            refused = live.admin("sleep")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "busy")
            assert refused.json()["error"]["message"].startswith("1 requests are inside")
            with ThreadPoolExecutor(1) as threads:
                slept = threads.submit(live.admin, "sleep", wait=True)
                assert [line for line in lines if line][-1] == "data: [DONE]"
                assert slept.result().json()["phase"] == "sleeping"
        assert live.admin("sleep").json()["phase"] == "sleeping", "it is asleep already"
        woken = live.admin("wake").json()
        assert woken["phase"] == "ready" and woken["seconds"] > 0
        assert live.admin("wake").json()["seconds"] < woken["seconds"]
        assert gate.num_loads == 2


def test_a_reload_under_load_loses_no_request_and_finds_what_is_new(tmp_path: Path, gate: Gate) -> None:
    source = real_model("demo")
    assert source is not None
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    with serve(folder, admin_key="operator", drain_timeout_s=60) as live, ThreadPoolExecutor(6) as threads:
        expected = ask(live).json()["choices"]
        before = httpx.get(f"{live.url}/v1/models/demo").json()["max_model_len"]
        config = (folder / "config.json").read_text("utf-8")
        assert f'"max_position_embeddings": {before}' in config
        half = config.replace(f'"max_position_embeddings": {before}', f'"max_position_embeddings": {before // 2}')
        (folder / "config.json").write_text(half, "utf-8")
        done = threading.Event()

        def client() -> list[Any]:
            answers = []
            while not done.is_set():
                answers.append(ask(live))
            return answers

        clients = [threads.submit(client) for _ in range(5)]
        reloads = [live.admin("reload") for _ in range(2)]
        time.sleep(0.2)
        done.set()
        answers = [answer for future in clients for answer in future.result()]
        assert [reload.json()["phase"] for reload in reloads] == ["ready"] * 2
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.json()["choices"] == expected for answer in answers)
        assert gate.num_loads == 3
        assert httpx.get(f"{live.url}/v1/models/demo").json()["max_model_len"] == before // 2


def test_a_drained_server_refuses_until_it_is_woken(gate: Gate) -> None:
    with serve(admin_key="operator", sleep_idle_s=3600) as live:
        assert live.admin("drain").json()["phase"] == "drained"
        assert live.admin("drain").json()["phase"] == "drained"
        assert httpx.get(f"{live.url}/ready").status_code == 503
        assert httpx.get(f"{live.url}/health").status_code == 200
        refused = ask(live)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert live.admin("wake").json()["phase"] == "ready"
        assert ask(live).status_code == 200


def test_what_cannot_be_woken_says_why(tmp_path: Path) -> None:
    source = real_model("demo")
    assert source is not None
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    with serve(folder, admin_key="operator") as live:
        expected = ask(live).json()["choices"]
        live.admin("sleep")
        folder.rename(tmp_path / "elsewhere")
        failed = ask(live)
        assert failed.status_code == 500
        message = failed.json()["error"]["message"]
        assert message.startswith("the model could not be loaded: ") and str(folder) in message
        assert ask(live).json()["error"]["message"] == message
        assert httpx.get(f"{live.url}/ready").json()["phase"] == "failed"
        assert str(folder) in httpx.get(f"{live.url}/health").json()["error"]["message"]
        assert httpx.get(f"{live.url}/v1/models").status_code == 500
        assert live.admin("sleep").status_code == 409
        assert str(folder) in live.admin("reload").json()["error"]["message"]
        (tmp_path / "elsewhere").rename(folder)
        assert live.admin("wake").json()["phase"] == "ready"
        assert ask(live).json()["choices"] == expected
