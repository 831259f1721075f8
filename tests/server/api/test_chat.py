"""/v1/chat/completions: rendering, shapes, logprobs, streams."""

from __future__ import annotations

from typing import Any

import pytest

BOS, EOS = 256, 257


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


def test_shape(bench: Any) -> None:
    body = bench.chat().json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == 12


def test_messages_go_through_the_template(bench: Any) -> None:
    bench.chat(
        messages=[
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None},
            {"role": "user", "content": "", "name": "ann"},
        ]
    )
    assert prompt_text(bench) == "[system]rules\n[user]a\nb\n[assistant]ok\n[user]\n[assistant]"
    assert bench.engine.requests[-1].prompt_ids.count(BOS) == 1


def test_control_tokens_in_a_message_are_text(bench: Any) -> None:
    bench.chat(messages=[{"role": "user", "content": "<eos><bos>"}])
    ids = bench.engine.requests[-1].prompt_ids
    assert (ids.count(BOS), ids.count(EOS)) == (1, 0)
    assert "<eos><bos>" in prompt_text(bench)


def test_prefill(bench: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure,"}]
    bench.chat(messages=messages, continue_final_message=True)
    assert prompt_text(bench) == "[user]hi\n[assistant]Sure,"
    bench.chat(messages=messages, add_generation_prompt=False)
    assert prompt_text(bench) == "[user]hi\n[assistant]Sure,\n"


def test_default_length_is_what_fits(bench: Any) -> None:
    bench.chat()
    num_prompt = len(bench.engine.requests[-1].prompt_ids)
    assert bench.params().max_tokens == 200 - num_prompt


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length(bench: Any, field: str) -> None:
    body = bench.chat(**{field: 3}).json()
    assert body["choices"][0]["message"]["content"] == "hel"
    assert body["choices"][0]["finish_reason"] == "length"
    assert bench.chat(max_tokens=4, max_completion_tokens=4).json()["usage"]["completion_tokens"] == 4


def test_logprobs(bench: Any) -> None:
    bench.script.text = "é"
    content = bench.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], list(b"<eos>")]
    assert content[0]["token"] == "\ufffd"
    assert content[0]["logprob"] == -0.5
    assert [(top["bytes"], top["logprob"]) for top in content[0]["top_logprobs"]] == [([0xC3], -0.5), ([65], -2.0)]
    assert bytes(content[0]["bytes"] + content[1]["bytes"]).decode() == "é"
    assert bench.params().logprobs == 2


def test_logprobs_without_alternatives(bench: Any) -> None:
    choice = bench.chat(logprobs=True).json()["choices"][0]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])
    assert bench.params().logprobs == 0
    assert bench.chat(logprobs=False).json()["choices"][0]["logprobs"] is None
    assert bench.params().logprobs is None


def test_stream_framing(bench: Any, read_events: Any) -> None:
    events = read_events(bench.chat(stream=True, max_tokens=2))
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "h"},
        {"content": "e"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
    assert "stop_reason" in chunks[-1]["choices"][0]
    assert "usage" not in chunks[0]


def test_stream_usage(bench: Any, read_events: Any) -> None:
    events = read_events(bench.chat(stream=True, stream_options={"include_usage": True}))
    assert (events[-2]["choices"], events[-1]) == ([], "[DONE]")
    assert events[-2]["usage"] == bench.chat().json()["usage"]
    assert all(chunk["usage"] is None for chunk in events[:-2])


def test_stream_of_several_answers(bench: Any, read_events: Any) -> None:
    bench.script.text = lambda i: f"answer {i}"
    chunks = read_events(bench.chat(stream=True, n=3))[:-1]
    texts = {0: "", 1: "", 2: ""}
    roles, finishes = [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] * ("role" in choice["delta"])
        finishes += [choice["index"]] * (choice["finish_reason"] == "stop")
    assert texts == {i: f"answer {i}" for i in range(3)}
    assert sorted(roles) == sorted(finishes) == [0, 1, 2]


def test_stream_with_an_empty_answer_has_role_and_finish(bench: Any, read_events: Any) -> None:
    bench.script.text = ""
    chunks = read_events(bench.chat(stream=True))[:-1]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert bench.chat().json()["choices"][0]["message"]["content"] == ""


def test_stream_stop_string(bench: Any, read_events: Any) -> None:
    chunks = read_events(bench.chat(stream=True, stop="lo wo", logprobs=True))[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hel"
    assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["stop_reason"]) == ("stop", "lo wo")
    entries = [e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert "".join(entry["token"] for entry in entries) == "hello wo"


def test_template_refusal_is_a_bad_request(bench: Any) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]
    response = bench.chat(messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "system must come first" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"service_tier": "auto", "store": False, "parallel_tool_calls": True},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"reasoning_effort": "none", "verbosity": "medium", "logprobs": None, "top_logprobs": None, "stop": None},
        {"n": None, "temperature": None, "stream": None, "max_tokens": None, "seed": None, "logit_bias": None},
        {"presence_penalty": 0, "frequency_penalty": 0, "stop": []},
    ],
)
def test_neutral_values_are_accepted(bench: Any, extra: dict[str, Any]) -> None:
    response = bench.chat(**extra)
    assert response.status_code == 200, response.text


def test_an_answer_may_come_back_as_clients_keep_it(bench: Any) -> None:
    """With what the openai clients and LiteLLM add to it, which does not change the prompt."""
    function = {"name": "f", "arguments": "{}"}

    def ask(message: dict[str, Any], more: dict[str, Any]) -> Any:
        call = {"id": "c", "type": "function", "function": {**function, **more}, **({"index": 0} if more else {})}
        result = {"role": "tool", "tool_call_id": "c", "content": "done"}
        return bench.chat(messages=[{"role": "user", "content": "x"}, {**message, "tool_calls": [call]}, result])

    message = {"role": "assistant", "content": "y"}
    kept = {"refusal": None, "annotations": [], "parsed": {"a": [1]}, "provider_specific_fields": {"refusal": None}}
    plain, full = ask(message, {}), ask({**message, **kept}, {"parsed_arguments": {"b": 2}})
    assert (plain.status_code, full.status_code) == (200, 200), full.text
    assert plain.json()["usage"] == full.json()["usage"]
    for name, value in (("annotations", [{"type": "url_citation"}]), ("provider_specific_fields", {"thinking": "z"})):
        refused = ask({**message, name: value}, {})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"messages[1].{name}")
