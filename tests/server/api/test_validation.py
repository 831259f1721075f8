"""What is refused, with the field named: wrong types, values out of range, unknown and unserved fields, no room."""

from __future__ import annotations

from typing import Any

import pytest

COMPLETION_REFUSALS: list[tuple[dict[str, Any], str | None, str]] = [
    # types: JSON true and "5" are no numbers
    ({"temperature": True}, "temperature", "number"),
    ({"temperature": "1"}, "temperature", "number"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"n": 1.0}, "n", "integer"),
    ({"stream": 1}, "stream", "boolean"),
    ({"echo": "yes"}, "echo", "boolean"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]", "integer"),
    ({"logit_bias": {"5": True}}, "logit_bias", "number"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"model": 3}, "model", "string"),
    # ranges, with the limit in the message
    ({"temperature": 2.1}, "temperature", "2"),
    ({"temperature": -0.1}, "temperature", "0"),
    ({"top_p": 0}, "top_p", "0"),
    ({"top_p": 1.01}, "top_p", "1"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 1.1}, "min_p", "1"),
    ({"presence_penalty": 2.1}, "presence_penalty", "2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "-2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "10"),
    ({"seed": 2**63}, "seed", "9223372036854775807"),
    ({"seed": -(2**63) - 1}, "seed", "-9223372036854775808"),
    ({"max_tokens": -1}, "max_tokens", "0"),
    ({"max_tokens": 10**30}, "max_tokens", "2147483647"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"min_tokens": -1}, "min_tokens", "0"),
    ({"n": 0}, "n", "1"),
    ({"n": 129}, "n", "128"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": -1}, "logprobs", "0"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    ({"logit_bias": {"258": 1}}, "logit_bias", "258"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "05"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "x"),
    ({"stop_token_ids": [258]}, "stop_token_ids", "258"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "0"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "128"),
    ({"stop": ""}, "stop", "1"),
    ({"stop": ["a", ""]}, "stop", "1"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": 5}, "stop", "string"),
    ({"stop": ["a", 5]}, "stop", "string"),
    ({"stop": "x" * 1025}, "stop", "1024"),
    # prompts
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": [[1], []]}, "prompt", "empty"),
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": 5}, "prompt", "string"),
    ({"prompt": [1.5]}, "prompt", "string"),
    ({"prompt": [True]}, "prompt", "string"),
    ({"prompt": [[1, "a"]]}, "prompt", "integers"),
    ({"prompt": {"text": "a"}}, "prompt", "string"),
    ({"prompt": [258]}, "prompt", "258"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [10**30]}, "prompt", "vocabulary of 258"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": ["ok", "a\udfff"]}, "prompt", "surrogate"),
    ({"stop": "\ud800"}, "stop", "surrogate"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    # combinations
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "false"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "4"),
    ({"best_of": 2}, "best_of", "n"),
    ({"best_of": True}, "best_of", "n"),
    # known, not served
    ({"suffix": "end"}, "suffix", "support"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "goes with"),
    ({"guided_json": [1]}, "guided_json", "schema"),
    ({"use_beam_search": True}, "use_beam_search", "support"),
    ({"prompt_embeds": "x"}, "prompt_embeds", "support"),
    ({"repetition_detection": {}}, "repetition_detection", "support"),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "-1"),
    ({"stream_interval": 5}, "stream_interval", "1"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs", "{}"),
    ({"store": True}, "store", "false"),
    ({"store": 0}, "store", "false"),
    ({"service_tier": "flex"}, "service_tier", "default"),
    # unknown
    ({"max_token": 5}, "max_token", "unknown"),
    ({"\ud800": 5}, None, "unicode"),
]  # fmt: skip

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT_REFUSALS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "1"),
    ({"messages": None}, "messages", "list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "user"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "has to be there"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id", "role tool"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
    ({"messages": [{"role": "user", "content": "x", "name": "\ud800"}]}, "messages[0].name", "surrogate"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content", "part 0"),
    ({"messages": [{"role": "user", "content": "x", "mood": "bad"}]}, "messages[0].mood", "unknown"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", "missing"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages[0].tool_calls[0].function.arguments", "no JSON object"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"tools": [TOOL, TOOL]}, "tools", "same name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "no tool"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "exclude"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"functions": [{}]}, "functions", "support"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "none"),
    ({"modalities": ["text", "audio"]}, "modalities", "text"),
    ({"audio": {"voice": "x"}}, "audio", "support"),
    ({"prediction": {}}, "prediction", "support"),
    ({"logprobs": 5}, "logprobs", "boolean"),
    ({"top_logprobs": 5}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    ({"n": 129}, "n", "128"),
    ({"echo": True}, "echo", "support"),
    ({"prompt": "x"}, "prompt", "unknown"),
]  # fmt: skip


def assert_refused(response: Any, param: str | None, hint: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert hint in error["message"]


def send(bench: Any, path: str, body: dict[str, Any]) -> Any:
    import json  # the client's own encoder refuses lone surrogates

    return bench.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("change", "param", "hint"), COMPLETION_REFUSALS, ids=lambda v: ascii(v)[:50])
def test_completions_refuse(bench: Any, change: dict[str, Any], param: str | None, hint: str) -> None:
    response = send(bench, "/v1/completions", {"model": "tiny", "prompt": "say", **change})
    assert_refused(response, param, hint)
    assert bench.engine.requests == []


@pytest.mark.parametrize(("change", "param", "hint"), CHAT_REFUSALS, ids=lambda v: ascii(v)[:50])
def test_chat_refuses(bench: Any, change: dict[str, Any], param: str | None, hint: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **change}
    assert_refused(send(bench, "/v1/chat/completions", body), param, hint)
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    ("change", "code"),
    [({"nope": 1}, "unknown_parameter"), ({"suffix": "x"}, "unsupported_value"), ({"n": 0}, "invalid_value")],
)
def test_codes(bench: Any, change: dict[str, Any], code: str) -> None:
    assert bench.complete(**change).json()["error"]["code"] == code


def test_missing_fields_are_named(bench: Any) -> None:
    response = bench.post("/v1/completions", {"prompt": "x"})
    assert_refused(response, "model", "required")
    assert response.json()["error"]["code"] == "missing_parameter"
    assert_refused(bench.post("/v1/completions", {"model": "tiny"}), "prompt", "required")
    assert_refused(bench.post("/v1/chat/completions", {"model": "tiny"}), "messages", "required")


def test_up_to_five_mistakes_are_listed_and_inputs_are_shortened(bench: Any) -> None:
    response = bench.complete(temperature=9, n=0, a=1, b=2, c=3, d=4, user=[1] * 1000)
    message = response.json()["error"]["message"]
    assert "n: " in message
    assert "temperature: " in message
    assert "and 2 more" in message
    assert len(message) < 1000
    assert response.json()["error"]["param"] == "n"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "metadata", "prompt"])
def test_json_constants_are_refused_everywhere(bench: Any, number: str, field: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "{field}": {number}}}'
    response = bench.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_overflowing_numbers_are_refused(bench: Any, number: str, field: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "{field}": {number}}}'
    response = bench.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_overflowing_bias_is_refused(bench: Any) -> None:
    body = '{"model": "tiny", "prompt": "x", "logit_bias": {"5": 1e400}}'
    response = bench.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert_refused(response, "logit_bias", "100")


def test_context_limit_with_an_explicit_length(make_bench: Any) -> None:
    bench = make_bench(max_model_len=10)
    response = bench.complete(prompt="12345678", max_tokens=3)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    for number in ("8", "3", "11", "10", "2"):
        assert number in error["message"].replace(",", "").split()
    assert bench.complete(prompt="12345678", max_tokens=2).status_code == 200


@pytest.mark.parametrize("extra", [{}, {"max_tokens": 1}, {"stream": True}])
def test_context_limit_of_the_prompt_alone(make_bench: Any, extra: dict[str, Any]) -> None:
    bench = make_bench(max_model_len=10)
    error = bench.complete(prompt="1234567890", **extra).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert bench.complete(prompt="123456789").status_code == 200


def test_context_limit_of_scoring(make_bench: Any) -> None:
    bench = make_bench(max_model_len=10)
    assert bench.complete(prompt="1234567890", echo=True, max_tokens=0).status_code == 200
    error = bench.complete(prompt="12345678901", echo=True, max_tokens=0).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_context_limit_of_a_chat(make_bench: Any) -> None:
    bench = make_bench(max_model_len=40)
    long = [{"role": "user", "content": "x" * 40}]
    error = bench.chat(messages=long).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = bench.chat(max_completion_tokens=39).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_completion_tokens")


def test_one_bad_prompt_refuses_the_whole_call(make_bench: Any) -> None:
    bench = make_bench(max_model_len=10)
    assert bench.complete(prompt=["ok", "12345678901"]).status_code == 400
    assert bench.engine.requests == []


def test_sequences_of_a_call_are_limited(make_bench: Any) -> None:
    bench = make_bench(max_sequences_per_request=4)
    assert bench.complete(prompt=["a", "b"], n=2).status_code == 200
    error = bench.complete(prompt=["a", "b"], n=3).json()["error"]
    assert error["param"] == "n"
    assert "6" in error["message"]
    assert "4" in error["message"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "abc", ""])
def test_timeout_header_must_be_a_positive_number(bench: Any, value: str) -> None:
    response = bench.post("/v1/completions", {"model": "tiny", "prompt": "x"}, headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout"


@pytest.mark.parametrize(
    ("limit", "header", "expected"),
    [(None, None, None), (None, "5", 5.0), (3.0, None, 3.0), (3.0, "5", 3.0), (9.0, "5", 5.0)],
)
def test_deadline(make_bench: Any, limit: float | None, header: str | None, expected: float | None) -> None:
    import time

    bench = make_bench(request_timeout_s=limit)
    headers = {} if header is None else {"X-Request-Timeout": header}
    before = time.monotonic()
    assert bench.post("/v1/completions", {"model": "tiny", "prompt": "x"}, headers=headers).status_code == 200
    deadline = bench.engine.requests[-1].deadline_s
    if expected is None:
        assert deadline is None
    else:
        assert before + expected <= deadline <= time.monotonic() + expected
