"""Users as locust runs them: what they count, against a server of known delays and against the real one."""

from __future__ import annotations

import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from live import serve
from locusts import GAP_S, PIECES, ROOT, TTFT_S, command, environment, run, scripted

# looked for, not imported: its import would patch the sockets of this process
pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed: make test installs it")


def test_events_are_those_of_the_stream(tmp_path: Path) -> None:
    """Lower bounds and counts only: a busy machine makes everything later, and nothing sooner."""
    with scripted(owner="vllm") as (url, script):
        found = run(tmp_path, url, "-u", "2", "-r", "2", "-t", "3s", "Chat", "Completion", LOADTEST_PROMPT_WORDS="7")
    assert found.status == 0, found.log
    for kind in ("chat", "completion"):
        assert found.count("POST", kind) >= 1
        assert found.count("ttft", kind) == found.count("POST", kind)
        assert found.count("itl", kind) == (PIECES - 1) * found.count("ttft", kind)
        assert found.lowest_ms("ttft", kind) >= 1e3 * TTFT_S, "headers are no first token"
        assert found.lowest_ms("POST", kind) >= 1e3 * (TTFT_S + (PIECES - 1) * GAP_S), "to the last byte"
        assert found.mean_ms("itl", kind) >= 0.9e3 * GAP_S
    asked = found.count("POST", "chat") + found.count("POST", "completion")
    assert found.summary["answered"] == asked
    assert found.summary["new_tokens"] == PIECES * asked
    body = next(body for body in script.bodies if "prompt" in body)
    assert len(body["prompt"].split()) == 7, "the variable LOADTEST_PROMPT_WORDS"
    assert body["model"] == "scripted" and body["stream"] and body["ignore_eos"] is True
    chat = max((body["messages"] for body in script.bodies if "messages" in body), key=len)
    assert [message["role"] for message in chat[:4]] == ["system", "user", "assistant", "user"][: len(chat)]
    assert len(chat) < 3 or chat[2]["content"] == " x" * PIECES, "the answer goes into the next question"


def test_refusals_are_no_failures_and_failures_have_the_servers_words(tmp_path: Path) -> None:
    with scripted(503, 429, 400, "error", "cut") as (url, script):
        found = run(tmp_path, url, "-u", "1", "-t", "6s", "--most-retry-s", "5", "Completion")
    assert found.count("refused", "completion 503") == found.count("refused", "completion 429") == 1
    assert found.summary["refused"] == {"503": 1, "429": 1}
    assert found.summary["refused_without_retry_after"] == 1, "the 429 of this script says none"
    assert script.times[1] - script.times[0] >= 1.0, "Retry-After was not waited for"
    assert found.summary["failed"] == 3 == sum(int(row["Occurrences"]) for row in found.failures)
    messages = " ".join(row["Error"] for row in found.failures)
    for text in ("HTTP 400: scripted 400", "out of pages", "without a finish_reason"):
        assert text in messages
    assert found.status == 1, "failures are in the exit status"
    assert all("ignore_eos" not in body for body in script.bodies), "no field that is not OpenAI's for others"


def test_all_kinds_against_the_real_server(tmp_path: Path) -> None:
    """A small queue: some are refused, some hang up, and all pages come back."""
    with serve(max_num_seqs=4, max_queue=4) as live:
        found = run(
            tmp_path, live.url, "-u", "12", "-r", "12", "-t", "6s", "--shape", "step", "--steps", "2",
            "--new-tokens", "12", "--long-words", "120", "--shared-words", "60", "--most-retry-s", "0.2",
        )  # fmt: skip
        assert live.is_idle(), "a client that hung up, or a refusal, left something behind"
        tokens = live.metric("vllm:generation_tokens_total")
    assert found.summary["failed"] == 0, found.failures
    assert found.summary["left"] == found.count("left", "left") >= 1
    assert "Shape test updating to 6 users" in found.log and "updating to 12 users" in found.log
    assert found.count("POST", "chat") + found.count("POST", "completion") >= 2
    assert sum(found.summary["refused"].values()) >= 1, "twelve users, some with bursts, for eight places"
    assert found.summary["refused_without_retry_after"] == 0
    assert 0 < found.summary["new_tokens"] <= tokens
    after = found.summary["after"]
    assert after["ready"] and after["running"] == after["waiting"] == after["cache_share"] == 0
    assert after["memory_bytes"] > 0


def test_the_page_starts_and_stops_a_run() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with scripted() as (url, script):
        flags = ("--web-host", "127.0.0.1", "--web-port", str(port), "Completion")
        process = subprocess.Popen(command(url, *flags), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        try:
            page = f"http://127.0.0.1:{port}"
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:
                try:
                    text = httpx.get(page).text
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            assert "prompt_words" in text and "leave_after" in text, "our options are fields of the page"
            form = {"user_count": "2", "spawn_rate": "2", "host": url, "prompt_words": "3"}
            assert httpx.post(f"{page}/swarm", data=form).json()["success"]
            while len(script.bodies) < 3 and time.monotonic() < end:
                time.sleep(0.05)
            assert len(script.bodies[0]["prompt"].split()) == 3
            httpx.get(f"{page}/stop")
            rows = httpx.get(f"{page}/stats/requests").json()["stats"]
            assert {row["method"] for row in rows} >= {"POST", "ttft", "itl"}
        finally:
            process.terminate()
            process.wait(20)


def test_a_shape_without_an_end_says_so(tmp_path: Path) -> None:
    with scripted() as (url, _):
        found = run(tmp_path, url, "-u", "2", "--shape", "soak", "Completion")
    assert found.status == 2 and "soak needs --run-time" in found.log
