"""What is written of a request: the JSON access log, and the times in `usage`."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from typing import Any

import httpx
import pytest

from server.core import FinishReason

TIMINGS = {"queue_ms", "cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms",
           "predicted_per_second"}  # fmt: skip


def lines_of(caplog: Any) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "server.access"]


@pytest.fixture
def json_bench(make_bench: Any, caplog: Any) -> Any:
    caplog.set_level(logging.INFO, logger="server.access")
    return make_bench(access_log="json", api_keys=("alice=a",))


def test_a_completion(json_bench: Any, caplog: Any) -> None:
    json_bench.script.num_cached, json_bench.script.delay_s = 2, 0.002
    headers = {"Authorization": "Bearer a", "X-Request-Id": "mine"}
    body = {"model": "tiny", "prompt": "a secret", "n": 2, "max_tokens": 5}
    json_bench.post("/v1/completions", body, headers=headers)
    [line] = lines_of(caplog)
    assert abs(datetime.fromisoformat(line.pop("time")).timestamp() - datetime.now().timestamp()) < 60
    queue, prefill, decode, duration = (line.pop(f"{k}_ms") for k in ("queue", "prefill", "decode", "duration"))
    assert queue >= 0 and prefill >= 0 and decode > 4 and queue + prefill + decode <= duration
    assert line == {
        "request_id": "mine", "method": "POST", "path": "/v1/completions", "status": 200, "error": None,
        "key": "alice", "model": "tiny", "prompt_tokens": 8, "cached_tokens": 2, "completion_tokens": 10,
        "finish_reasons": ["length", "length"],
    }  # fmt: skip
    assert "secret" not in caplog.text and "Bearer" not in caplog.text


def test_refusals_have_their_code(json_bench: Any, caplog: Any) -> None:
    json_bench.post("/v1/completions", {"model": "tiny", "prompt": "x"})
    json_bench.post("/v1/completions", {"model": "other", "prompt": "x"}, headers={"Authorization": "Bearer a"})
    json_bench.client.get("/x%0A%7B%7D", headers={"Authorization": "Bearer a"})
    lines = lines_of(caplog)
    assert [(x["status"], x["error"], x["key"], x["model"]) for x in lines] == [
        (401, "invalid_api_key", None, None),
        (404, "model_not_found", "alice", None),
        (404, "not_found", "alice", None),
    ]
    assert all(x["queue_ms"] is None and x["prompt_tokens"] == 0 for x in lines)


def test_an_error_within_a_stream_shows(json_bench: Any, caplog: Any) -> None:
    json_bench.script.end = FinishReason.ERROR
    body = {"model": "tiny", "prompt": "x", "stream": True}
    json_bench.post("/v1/completions", body, headers={"Authorization": "Bearer a"})
    [line] = lines_of(caplog)
    assert (line["status"], line["error"], line["finish_reasons"]) == (200, "engine_error", ["error"])


def test_a_client_that_leaves(make_bench: Any, serve: Any, eventually: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="server.access")
    bench = make_bench(access_log="json")
    bench.script.text, bench.script.delay_s = "x" * 1000, 0.01
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 150}
    with httpx.stream("POST", f"http://{serve(bench)}/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert eventually(lambda: lines_of(caplog))
    [line] = lines_of(caplog)
    assert line["finish_reasons"] == ["abort"] and 0 < line["completion_tokens"] < 150


def test_probes_are_quiet_and_off_is_off(make_bench: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="server.access")
    make_bench(access_log="json").client.get("/health")
    make_bench(access_log="off").complete()
    assert lines_of(caplog) == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_carries_times_where_asked(bench: Any, read_events: Any, path: str, stream: bool) -> None:
    bench.script.num_cached, bench.script.delay_s = 1, 0.002
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5}
    body |= {"prompt": "say"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}

    def usage(headers: dict[str, str]) -> dict[str, Any]:
        response = bench.post(path, body, headers=headers)
        found: dict[str, Any] = (read_events(response)[-2] if stream else response.json())["usage"]
        return found

    assert "timings" not in usage({}) and "timings" not in usage({"X-Include-Timings": "no"})
    found = usage({"X-Include-Timings": "true"})
    timings = found["timings"]
    assert set(timings) == TIMINGS
    assert (timings["cache_n"], timings["predicted_n"]) == (1, 5)
    assert timings["prompt_n"] == found["prompt_tokens"] - 1
    assert 4 < timings["predicted_ms"] < 1000
    assert timings["predicted_per_second"] == pytest.approx(4000 / timings["predicted_ms"], rel=1e-2)


def test_times_of_one_token(bench: Any) -> None:
    response = bench.complete(max_tokens=1).json()
    assert "timings" not in response["usage"]
    body = {"model": "tiny", "prompt": "say", "max_tokens": 1}
    timings = bench.post("/v1/completions", body, headers={"X-Include-Timings": "1"}).json()["usage"]["timings"]
    assert timings["predicted_per_second"] is None and timings["predicted_n"] == 1
