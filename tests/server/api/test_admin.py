"""/health, /ready, /metrics, /version, /v1/models, /tokenize, /detokenize, the schema and the lifespan."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.admin import STALLED_AFTER_S
from server.tokenizer import DEFAULT_CHAT_TEMPLATE


def test_models(bench: Any) -> None:
    body = bench.client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "org/alias"]
    card = body["data"][0]
    assert (card["object"], card["owned_by"], card["root"]) == ("model", "spq-serve", "models/tiny")
    assert card["max_model_len"] == 200
    assert abs(card["created"] - time.time()) < 60
    assert card["spq"] == {
        "kv_tokens": 1024, "max_num_seqs": 8, "dtype": "float32", "kv_dtype": "int8", "device": "cpu",
        "backend": "cpu", "memory_bytes": {"weights": 1000, "kv": 500, "free": 10},
        "compression": {"preset": "default", "ratio_to_fp16": 2.5, "mean_rank_kept": 0.4},
    }  # fmt: skip
    assert bench.client.get("/v1/models/org/alias").json()["id"] == "org/alias"


def test_models_while_loading(make_bench: Any) -> None:
    bench = make_bench(loaded=False)
    assert bench.client.get("/v1/models").status_code == 503
    assert bench.client.get("/v1/models/tiny").json()["error"]["code"] == "model_loading"


@pytest.mark.parametrize("phase", ["starting", "compressing", "loading", "warming_up"])
def test_start_up_is_healthy_but_not_ready(make_bench: Any, phase: str) -> None:
    bench = make_bench(loaded=False)
    current = bench.service.current
    current.phase, current.detail, current.progress, current.eta_s = phase, "layer 3/8", 0.375, 41.6
    assert bench.client.get("/health").status_code == 200
    response = bench.client.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "42"
    assert response.json() == {
        "phase": phase, "progress": 0.375, "detail": "layer 3/8", "elapsed_s": 12.5, "eta_s": 41.6,
    }  # fmt: skip
    assert "vllm:num_requests_running" in bench.client.get("/metrics").text


def test_ready(bench: Any) -> None:
    response = bench.client.get("/ready")
    assert response.status_code == 200
    assert response.json()["phase"] == "ready"
    assert "retry-after" not in response.headers


def test_draining_is_healthy_but_not_ready(bench: Any) -> None:
    bench.service.current.phase = "draining"
    bench.engine.alive = False  # the loop has ended in order
    assert bench.client.get("/health").status_code == 200
    response = bench.client.get("/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "10")


def test_failed_start_is_unhealthy(make_bench: Any) -> None:
    bench = make_bench(loaded=False)
    bench.service.current.phase, bench.service.current.error = "failed", "no such folder"
    response = bench.client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "no such folder", "type": "server_error", "param": None, "code": "unhealthy",
    }  # fmt: skip
    assert bench.client.get("/ready").json()["detail"] == "no such folder"


def test_dead_engine_is_unhealthy(bench: Any) -> None:
    bench.engine.alive = False
    assert bench.client.get("/health").status_code == 503
    assert bench.client.get("/ready").status_code == 503


def test_a_loop_that_hangs_with_work_is_unhealthy(bench: Any) -> None:
    bench.engine.last_step_s = time.monotonic() - STALLED_AFTER_S - 1
    assert bench.client.get("/health").status_code == 200, "an idle loop may rest"
    bench.engine.live.add(object())
    assert bench.client.get("/health").status_code == 503
    bench.engine.last_step_s = time.monotonic()
    assert bench.client.get("/health").status_code == 200
    bench.engine.live.clear()


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/tiny", "/v1/load"]
)
def test_head_is_get_without_a_body(bench: Any, path: str) -> None:
    response = bench.client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == bench.client.get(path).headers["content-type"]


def test_head_has_no_body_whatever_the_web_server_does(bench: Any) -> None:
    sent: list[dict[str, Any]] = []

    async def call() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "HEAD", "path": "/health", "headers": [], "query_string": b""}
        await bench.client.app(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 200
    assert b"".join(message.get("body", b"") for message in sent[1:]) == b""


def test_metrics_text_parses(bench: Any) -> None:
    bench.complete()
    response = bench.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0.25
    assert families["vllm:num_requests_running"].samples[0].labels == {"model_name": "tiny", "engine": "0"}
    assert families["spq:ready"].samples[0].value == 1


def test_version(bench: Any) -> None:
    assert set(bench.client.get("/version").json()) == {"version"}


def test_schema_names_our_models_and_no_422(bench: Any) -> None:
    schema = bench.client.get("/openapi.json").json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatCompletionRequest"
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    assert "temperature" in schema["components"]["schemas"]["CompletionRequest"]["properties"]


def test_lifespan(make_bench: Any) -> None:
    bench = make_bench()
    assert bench.service.calls == ["start"]
    bench.client.__exit__(None, None, None)
    assert bench.service.calls == ["start", "drain", "close"]
    bench.client.__enter__()


@pytest.mark.parametrize("path", ["/load", "/v1/load"])
def test_load(bench: Any, make_bench: Any, path: str) -> None:
    body = bench.client.get(path).json()
    assert body == {
        "server_load": 0, "num_running": 0, "num_waiting": 0, "max_num_seqs": 8, "max_queue": 256, "kv_usage": 0.25,
        "kv_tokens": 1024, "tokens_per_second": 0.0,
    }  # fmt: skip
    bench.complete()
    assert bench.client.get(path).json()["tokens_per_second"] > 0
    bench.engine.live.add(object())
    assert bench.client.get(path).json()["server_load"] == 1
    bench.engine.live.clear()
    assert make_bench(loaded=False).client.get(path).json()["error"]["code"] == "model_loading"


def test_tokenizer_info_is_a_tokenizer_config_without_paths(bench: Any) -> None:
    body = bench.client.get("/tokenizer_info").json()
    assert (body["bos_token"], body["eos_token"]) == ("<bos>", "<eos>")
    assert body["tokenizer_class"].startswith("PreTrainedTokenizer") or body["tokenizer_class"] == "TokenizersBackend"
    assert body["chat_template"] == bench.service.tokenizer.chat_template
    assert body["vocab_size"] == 258
    assert body["added_tokens_decoder"]["257"] == {"content": "<eos>", "special": True}
    assert "/" not in "".join(str(v) for k, v in body.items() if k not in ("chat_template", "added_tokens_decoder"))


def test_a_model_without_a_template_gets_the_stated_one(bench: Any, plain_tokenizer: Any) -> None:
    bench.service.tokenizer = plain_tokenizer
    assert bench.client.get("/tokenizer_info").json()["chat_template"] == DEFAULT_CHAT_TEMPLATE
    bench.chat()
    prompt = bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()
    assert prompt == "User: say\nAssistant:"


def test_tokenize_text(bench: Any) -> None:
    body = bench.post("/tokenize", {"prompt": "né"}).json()
    assert body == {"count": 3, "max_model_len": 200, "tokens": [110, 195, 169], "token_strs": None}
    body = bench.post("/tokenize", {"model": "tiny", "prompt": "a<eos>", "return_token_strs": True}).json()
    assert (body["tokens"], body["token_strs"]) == ([97, 257], ["a", "<eos>"])


def test_tokenize_chat_counts_what_a_chat_costs(bench: Any) -> None:
    messages = [{"role": "user", "content": "say"}]
    body = bench.post("/tokenize", {"messages": messages}).json()
    assert body["count"] == bench.chat().json()["usage"]["prompt_tokens"]
    assert body["tokens"] == bench.engine.requests[-1].prompt_ids
    shorter = bench.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["count"] == body["count"] - len("[assistant]")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "what": 1}, "what"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_tokenize_refuses(bench: Any, body: dict[str, Any], param: str) -> None:
    response = bench.post("/tokenize", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_detokenize_shows_special_tokens_and_reverses_tokenize(bench: Any) -> None:
    text = "né<eos>👋"
    tokens = bench.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert bench.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    assert bench.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("tokens", [[258], [-1], ["a"], [True], "ab", None])
def test_detokenize_refuses(bench: Any, tokens: Any) -> None:
    response = bench.post("/detokenize", {"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


def test_unknown_model_of_tokenize(bench: Any) -> None:
    assert bench.post("/tokenize", {"model": "x", "prompt": "a"}).status_code == 404
    assert bench.post("/detokenize", {"model": "x", "tokens": []}).status_code == 404
