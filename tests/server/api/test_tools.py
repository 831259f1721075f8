"""Tools on scripted answers: what the model is told, what clients get, whole and streamed, in every form."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from server.api.tool_formats import FORMATS

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD: Any = {"type": "function", "function": {"name": "add"}}
MESSAGES: Any = [{"role": "user", "content": "say"}]
CALLS = [("get_weather", {"city": "Paris, é"}), ("add", {"x": [1, {"y": None}]})]


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def talk(make_bench: Any, serve: Any, form: str, text: str, **options: Any) -> tuple[Any, Any]:
    """The same scripted answer whole, and as the official client puts it together from a stream."""
    bench = make_bench(tool_format=form, max_model_len=4000)
    bench.script.text = text
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER, ADD], **options}
        whole = client.chat.completions.create(**asked)
        with client.chat.completions.stream(**asked) as stream:
            deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            streamed = stream.get_final_completion()
    if streamed.choices[0].message.tool_calls:
        assert len(deltas) > 2, "arguments are handed on while they grow"
    return whole.choices[0], streamed.choices[0]


def test_calls_reach_the_client_in_every_form(make_bench: Any, serve: Any, form: str) -> None:
    for choice in talk(make_bench, serve, form, FORMATS[form].write(CALLS)):
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        calls = choice.message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS
        assert len({call.id for call in calls}) == 2 and {call.type for call in calls} == {"function"}
        if form == "mistral":
            assert all(len(call.id) == 9 and call.id.isalnum() for call in calls), "its templates refuse others"


def test_text_before_a_call_is_content(make_bench: Any, serve: Any) -> None:
    for choice in talk(make_bench, serve, "hermes", "Let me look.\n" + FORMATS["hermes"].write(CALLS)):
        assert choice.message.content == "Let me look."
        assert len(choice.message.tool_calls) == 2


def test_an_answer_without_a_call_is_as_ever(make_bench: Any, serve: Any, form: str) -> None:
    for choice in talk(make_bench, serve, form, "It is 5 < 6 { today"):
        assert (choice.message.content, choice.finish_reason) == ("It is 5 < 6 { today", "stop")
        assert not choice.message.tool_calls


def test_a_call_cut_by_max_tokens_says_length(make_bench: Any, read_events: Any) -> None:
    bench = make_bench(max_model_len=4000)
    begun = '{"name": "get_weather", "arguments": {"cit'
    bench.script.text = FORMATS["json"].write(CALLS[:1]).strip("[]")
    [choice] = bench.chat(tools=[WEATHER], max_tokens=len(begun)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"cit'}
    events = read_events(bench.chat(tools=[WEATHER], max_tokens=len(begun), stream=True))
    assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_chunks_name_a_call_once(make_bench: Any, read_events: Any) -> None:
    bench = make_bench(max_model_len=4000)
    bench.script.text = FORMATS["json"].write(CALLS)
    events = read_events(bench.chat(tools=[WEATHER, ADD], stream=True, n=2))
    for index in range(2):
        deltas = [c["delta"] for e in events[:-1] for c in e["choices"] if c["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
        starts = [piece for piece in pieces if "id" in piece]
        assert [(p["index"], p["type"], p["function"]) for p in starts] == [
            (0, "function", {"name": "get_weather", "arguments": ""}),
            (1, "function", {"name": "add", "arguments": ""}),
        ]
        for i, (_, arguments) in enumerate(CALLS):
            text = "".join(p["function"]["arguments"] for p in pieces if p["index"] == i)
            assert json.loads(text) == arguments
    reasons = [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c["finish_reason"]]
    assert reasons == ["tool_calls"] * 2


def test_logprobs_of_a_call_are_complete(make_bench: Any, read_events: Any) -> None:
    bench = make_bench(max_model_len=4000)
    bench.script.text = FORMATS["json"].write(CALLS[:1])
    whole = bench.chat(tools=[WEATHER], logprobs=True).json()["choices"][0]["logprobs"]["content"]
    events = read_events(bench.chat(tools=[WEATHER], logprobs=True, stream=True))
    pieces = [c["logprobs"] for e in events[:-1] for c in e["choices"] if c["logprobs"]]
    assert [entry for piece in pieces for entry in piece["content"]] == whole


def test_tool_choice_none_looks_for_no_calls(make_bench: Any) -> None:
    bench = make_bench(max_model_len=4000)
    bench.script.text = FORMATS["json"].write(CALLS)
    choice = bench.chat(tools=[WEATHER], tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == bench.script.text and choice["finish_reason"] == "stop"
    assert "get_weather" not in prompt_text(bench)


def test_only_allowed_tools_are_called(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt tells of all, so that its beginning stays the same; the grammar is of those allowed."""
    asked: list[Any] = []

    async def compile_constraint(body: Any, service: Any, tools: Any = None) -> None:
        asked.append(tools)

    monkeypatch.setattr("server.api.conversation.compile_constraint", compile_constraint)
    bench = make_bench(max_model_len=4000)
    for mode in ("auto", "required"):
        named = [{"type": "function", "function": {"name": "add"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        for i, called in ((0, None), (1, "add")):
            bench.script.text = FORMATS["json"].write(CALLS[i : i + 1])
            message = bench.chat(tools=[WEATHER, ADD], tool_choice=choice).json()["choices"][0]["message"]
            assert [call["function"]["name"] for call in message.get("tool_calls", ())] == ([called] if called else [])
            assert "get_weather" in prompt_text(bench)
        assert '\\"add\\"' in asked[-1].text and "get_weather" not in asked[-1].text
        assert ("TEXT" in asked[-1].text) == (mode == "auto")


def test_a_template_without_tools_gets_them_in_words(make_bench: Any) -> None:
    bench = make_bench(max_model_len=4000)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    bench.chat(messages=messages, tools=[WEATHER])
    text = prompt_text(bench)
    assert text.startswith("[system]Be short.\n\nYou may call these functions:\n")
    assert json.dumps(WEATHER["function"]) in text
    assert '[assistant][{"name": "get_weather", "arguments": {"city": "Paris"}}]\n' in text
    assert "[user]get_weather returned: rain\n" in text
    bench.chat(messages=messages[1:2], tools=[WEATHER])
    assert prompt_text(bench).startswith("[system]You may call")


NATIVE = (
    "{% for t in tools or [] %}T:{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}C:{{ c.id }} {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}"
    "{% if m.tool_call_id %}R:{{ m.tool_call_id }} {{ m.name }}{% endif %}{% endfor %}"
)


def test_a_template_with_tools_gets_them_as_it_knows_them(make_bench: Any, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", NATIVE)
    bench = make_bench(max_model_len=4000)
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    bench.chat(
        messages=[
            {"role": "user", "content": "Paris?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        tools=[WEATHER],
    )
    assert prompt_text(bench) == "T:get_weather [user]Paris?[assistant]C:c1 get_weather Paris[tool]rainR:c1 get_weather"
    counted = bench.post("/tokenize", {"messages": MESSAGES, "tools": [WEATHER]}).json()["tokens"]
    assert bytes(i for i in counted if i < 256).decode() == "T:get_weather [user]say"
