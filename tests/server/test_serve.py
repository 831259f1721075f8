"""The real thing: `python -m server` in a process of its own, compressed at start, over real sockets.

One server for the whole file; it checks the scheduler's books after every step only in the engine's own tests.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from models import real_model
from program import Server, end, start

from spq.output import remove_orphans

MIB = 1024**2
BUDGET = 1200 * MIB


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache: Path) -> Iterator[Server]:
    model = real_model("demo")
    assert model is not None, "the demo model is part of the repository"
    # 6 MiB of KV cache hold 2,048 tokens: 32 sequences of mixed length do not fit at once
    running = start(
        model, cache, "--served-model-name", "demo", "--memory-budget", str(BUDGET), "--kv-memory", "1700KiB",
        "--admission-reserve", "0", "--max-num-seqs", "32",
    )  # fmt: skip
    yield running
    status, log = end(running)
    assert status == 0, log
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_it_says_its_phases_while_it_starts(server: Server) -> None:
    assert "compressing" in server.phases and server.phases[-1] == "ready"
    seconds = server.metric("spq:startup_seconds", phase="compressing")
    assert 0 < seconds < 60


def test_models_tell_limits_and_compression(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    facts = model.model_extra["spq"]  # type: ignore[index]
    assert facts["compression"]["preset"] == "default"
    assert facts["compression"]["ratio_to_fp16"] > 1.9
    assert abs(sum(facts["memory_bytes"].values()) - BUDGET) < MIB
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions_agree_streamed_and_not(client: openai.OpenAI) -> None:
    options = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"


def test_chat_with_logprobs_and_n(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "The old man said"}], max_tokens=8, n=3, seed=5,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    texts = {c.message.content for c in answer.choices}
    assert len(answer.choices) == 3 and len(texts) > 1
    for choice in answer.choices:
        content = choice.logprobs.content  # type: ignore[union-attr]
        assert "".join(t.token for t in content) == choice.message.content  # type: ignore[union-attr]
        assert all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in content)  # type: ignore[union-attr]


def test_a_seed_repeats_and_a_stop_string_is_cut(client: openai.OpenAI) -> None:
    options = {"model": "demo", "prompt": "It was", "max_tokens": 40, "seed": 3, "temperature": 0.9}
    first, second = (client.completions.create(**options).choices[0].text for _ in range(2))  # type: ignore[call-overload]
    assert first == second
    stop = first[12:15]
    cut = client.completions.create(**options, stop=stop)  # type: ignore[call-overload]
    assert cut.choices[0].text == first[: first.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_errors_arrive_as_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="word " * 3000, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[1, 2, 5_000_000])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[], max_tokens=2)


def test_64_clients_a_third_of_them_leaving_leave_nothing_behind(server: Server) -> None:
    rng = random.Random(3)
    words = [
        "the",
        "old",
        "man",
        "went",
        "to",
        "sea",
        "and",
        "saw",
        "a",
        "great",
        "storm",
        "over",
        "dark",
        "hills",
        "with",
        "his",
        "little",
        "dog",
    ]
    prompts = [" ".join(rng.choices(words, k=rng.randrange(2, 150))) for _ in range(64)]
    lengths = [rng.randrange(10, 90) for _ in prompts]
    leaving = set(rng.sample(range(64), 21))
    before = {
        name: server.metric(f"vllm:{name}_total") for name in ("prompt_tokens", "generation_tokens", "num_preemptions")
    }

    async def ask(http: httpx.AsyncClient, i: int, leave: bool) -> tuple[str, dict[str, int] | None]:
        body = {"model": "demo", "prompt": prompts[i], "max_tokens": lengths[i], "temperature": 0, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
        text, usage = "", None
        async with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    text += chunk["choices"][0]["text"] if chunk["choices"] else ""
                    usage = chunk["usage"] or usage
                    if leave and len(text) > 10:
                        break
        return text, usage

    async def everything() -> list[tuple[str, dict[str, int] | None]]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            together = await asyncio.gather(*(ask(http, i, i in leaving) for i in range(64)))
            end_s = time.monotonic() + 5
            while server.metric("vllm:kv_cache_usage_perc") or server.metric("vllm:num_requests_running"):
                assert time.monotonic() < end_s, "memory is still held"
                await asyncio.sleep(0.05)
            grown = server.metric("vllm:generation_tokens_total") - before["generation_tokens"]
            stayed = [u["completion_tokens"] for i, (_, u) in enumerate(together) if i not in leaving and u]
            assert len(stayed) == 43
            # those who left had been given between one token and all of theirs
            assert sum(stayed) + 21 <= grown <= sum(lengths)
            for i in rng.sample(sorted(set(range(64)) - leaving), 12):
                alone, _usage = await ask(http, i, False)
                assert alone == together[i][0], f"request {i}"
        return together

    asyncio.run(everything())
    assert server.metric("vllm:num_preemptions_total") > before["num_preemptions"], "the test must force preemptions"
    assert server.metric("vllm:num_requests_waiting") == 0


def test_counters_are_the_sums_of_usage(server: Server, client: openai.OpenAI) -> None:
    names = ("prompt_tokens", "generation_tokens")
    before = [server.metric(f"vllm:{name}_total") for name in names]
    first = server.metric("vllm:time_to_first_token_seconds_count")
    answers = [
        client.completions.create(model="demo", prompt=["One", "Two words"], n=2, max_tokens=7, stop=["e"]),
        client.completions.create(model="demo", prompt="Three", max_tokens=9, echo=True, logprobs=1),
    ]
    usages = [a.usage for a in answers if a.usage is not None]
    after = [server.metric(f"vllm:{name}_total") for name in names]
    assert after[0] - before[0] == sum(u.prompt_tokens for u in usages)
    assert after[1] - before[1] == sum(u.completion_tokens for u in usages)
    assert server.metric("vllm:time_to_first_token_seconds_count") - first == 5


def test_the_budget_is_kept(server: Server) -> None:
    """After everything above: the highest resident set the kernel ever saw."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    assert peak <= BUDGET


def test_sigterm_lets_streams_end_and_the_second_start_finds_the_cache(server: Server, cache: Path) -> None:
    model = real_model("demo")
    assert model is not None
    second = start(model, cache, "--served-model-name", "demo", "--kv-memory", "64MiB")
    assert "compressing" not in second.phases
    body = {"model": "demo", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{second.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        second.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        ready = httpx.get(f"{second.url}/ready")
        assert (ready.status_code, ready.json()["phase"]) == (503, "draining")
        refused = httpx.post(f"{second.url}/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert second.process.wait(timeout=20) == 0


def test_a_model_that_cannot_be_served_ends_the_process_with_its_reason(cache: Path) -> None:
    model = real_model("demo")
    assert model is not None
    failed = start(model, cache, "--memory-budget", "100MiB", wait=False)
    _, log = failed.process.communicate(timeout=60)
    assert failed.process.returncode == 1
    assert "--memory-budget 100 MiB" in log and "needs" in log and "Traceback" not in log


def test_sigterm_during_compression_ends_quietly_and_leaves_no_half_model(tmp_path: Path) -> None:
    model = real_model("demo")
    assert model is not None
    starting = start(model, tmp_path, wait=False)
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        try:
            if httpx.get(f"{starting.url}/ready", timeout=5).json()["phase"] == "compressing":
                break
        except httpx.TransportError:
            time.sleep(0.02)
    status, log = end(starting)
    assert status == 0, log
    assert "Traceback" not in log and "terminate" not in log
    # where the compressor did not notice in time, on a busy machine, the next start removes what it left
    left = list(tmp_path.iterdir())
    assert all(path.suffix == ".tmp" for path in left)
    for path in left:
        remove_orphans(tmp_path / path.name.split(".")[1])
    assert list(tmp_path.iterdir()) == []
