"""POST /v1/messages on scripted answers: blocks, events, tools, refusals, and Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from server.api.tool_formats import FORMATS
from server.errors import EngineError, Overloaded
from tests.server.api.named_events import events_of, message_of

WEATHER: Any = {
    "name": "get_weather", "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
ADD: Any = {"name": "add", "input_schema": {"type": "object"}}
CALLS = [("get_weather", {"city": "Paris, é"}), ("add", {"x": [1, {"y": None}]})]
HERMES = "Let me look.\n" + FORMATS["hermes"].write(CALLS)
SAY = [{"role": "user", "content": "say"}]


class Compiler:
    """Stands for the grammar engine."""

    async def compile(self, constraint: Any) -> Any:
        return constraint


def ask(bench: Any, path: str = "", **body: Any) -> Any:
    limit = {} if path else {"max_tokens": bench.engine.info.max_model_len // 2}
    return bench.post("/v1/messages" + path, {"model": "tiny", "messages": SAY, **limit, **body})


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


@pytest.fixture
def hermes(make_bench: Any) -> Any:
    bench = make_bench(tool_format="hermes", max_model_len=4000)
    bench.script.text = HERMES
    return bench


def test_shape(bench: Any) -> None:
    bench.script.num_cached = 3
    body = ask(bench, system="Be brief.").json()
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message", "role": "assistant", "model": "tiny", "content": [{"type": "text", "text": "hello world"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": len(prompt_text(bench)) + 1 - 3, "cache_creation_input_tokens": 0,
                  "cache_read_input_tokens": 3, "output_tokens": 12},
    }  # fmt: skip
    assert prompt_text(bench) == "[system]Be brief.\n[user]say\n[assistant]"


def test_what_is_asked_reaches_the_engine(bench: Any) -> None:
    ask(bench, max_tokens=7, temperature=0.5, top_p=0.9, top_k=4, truncate_prompt_tokens=5, cache_salt="x")
    params = bench.params()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 4)
    assert len(bench.engine.requests[-1].prompt_ids) == 5 and bench.engine.requests[-1].cache_salt == "x"


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_to_stop(bench: Any, stream: bool) -> None:
    def ended(**body: Any) -> tuple[Any, Any, str]:
        response = ask(bench, stream=stream, **body)
        made = message_of(events_of(response)) if stream else response.json()
        return made["stop_reason"], made["stop_sequence"], "".join(b["text"] for b in made["content"])

    assert ended() == ("end_turn", None, "hello world")
    assert ended(max_tokens=4) == ("max_tokens", None, "hell")
    assert ended(stop_sequences=["zz", "o w"]) == ("stop_sequence", "o w", "hell")


def test_an_empty_answer_has_no_blocks(bench: Any) -> None:
    bench.script.text = ""
    assert ask(bench).json()["content"] == []
    assert [event["type"] for event in events_of(ask(bench, stream=True))] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip


def test_a_stream_makes_the_same_message(hermes: Any) -> None:
    for body in ({}, {"tools": [WEATHER, ADD]}):
        plain = ask(hermes, **body).json()
        streamed = message_of(events_of(ask(hermes, stream=True, **body)))
        for made in (plain, streamed):
            del made["id"]
            for block in made["content"]:
                block.pop("id", None)
        assert streamed == plain


@pytest.mark.parametrize("form", FORMATS)
def test_calls_are_blocks_in_every_form(make_bench: Any, form: str) -> None:
    bench = make_bench(tool_format=form, max_model_len=4000)
    bench.script.text = FORMATS[form].write(CALLS)
    body = ask(bench, tools=[WEATHER, ADD], max_tokens=1000).json()
    assert body["stop_reason"] == "tool_use"
    assert [(b["type"], b["name"], b["input"]) for b in body["content"]] == [("tool_use", *call) for call in CALLS]
    assert len({b["id"] for b in body["content"]}) == 2


def test_text_stands_before_its_calls(hermes: Any) -> None:
    kinds = [block["type"] for block in ask(hermes, tools=[WEATHER, ADD]).json()["content"]]
    assert kinds == ["text", "tool_use", "tool_use"]
    hermes.script.text = " \n " + FORMATS["hermes"].write(CALLS)
    kinds = [block["type"] for block in ask(hermes, tools=[WEATHER, ADD]).json()["content"]]
    assert kinds == ["tool_use", "tool_use"]
    hermes.script.text = " \n "
    assert ask(hermes, tools=[WEATHER, ADD]).json()["content"] == [{"type": "text", "text": " \n "}]


def test_a_call_that_is_cut_is_left_out(hermes: Any) -> None:
    body = ask(hermes, tools=[WEATHER, ADD], max_tokens=75).json()
    assert body["stop_reason"] == "max_tokens"
    assert [block["type"] for block in body["content"]] == ["text"]


def test_the_history_is_a_chat(hermes: Any) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "Looking."},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Paris"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "And now?"},
        ]},
    ]  # fmt: skip
    assert (
        ask(hermes, messages=turns, tools=[WEATHER], system=[{"type": "text", "text": "Be brief."}]).status_code == 200
    )
    text = prompt_text(hermes)
    assert text.startswith("[system]Be brief.\n\n") and '"get_weather"' in text
    said = text[text.index("[user]") :]
    call = FORMATS["hermes"].write([("get_weather", {"city": "Paris"})])
    assert (
        said
        == f"[user]Weather?\n[assistant]Looking.{call}\n[user]get_weather returned: rain\n[user]And now?\n[assistant]"
    )


def test_an_answer_that_was_begun_is_gone_on_with(bench: Any) -> None:
    ask(bench, messages=[*SAY, {"role": "assistant", "content": "Well, I"}])
    assert prompt_text(bench) == "[user]say\n[assistant]Well, I"


@pytest.mark.parametrize(
    ("choice", "names"),
    [({"type": "any"}, {"get_weather", "add"}), ({"type": "tool", "name": "add"}, {"add"})],
)
def test_forced_calls_have_a_grammar(hermes: Any, choice: Any, names: set[str]) -> None:
    hermes.service.grammars = Compiler()
    assert ask(hermes, tools=[WEATHER, ADD], tool_choice=choice).status_code == 200
    assert {name for name in ("get_weather", "add") if name in hermes.params().grammar.text} == names
    ask(hermes, tools=[WEATHER, ADD], tool_choice={"type": "auto"})
    assert hermes.params().grammar is None
    ask(hermes, tools=[WEATHER, ADD], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert hermes.params().grammar is not None
    made = ask(hermes, tools=[WEATHER, ADD], tool_choice={"type": "none"}).json()
    assert [block["type"] for block in made["content"]] == ["text"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "y"}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [*SAY, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]},
         "messages[1].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "f", "input": {"x": "\ud800"}}]}]}, "messages[0].content[0].input"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "high"}}, "output_config"),
        ({"temperature": 9}, "temperature"),
        ({"seed": 1}, "seed"),
    ],
)  # fmt: skip
def test_refusals(bench: Any, change: dict[str, Any], param: str) -> None:
    data = {"model": "tiny", "messages": SAY, "max_tokens": 9, **change}
    data = {key: value for key, value in data.items() if value is not None}
    response = bench.client.post("/v1/messages", content=json.dumps(data), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert bench.engine.requests == []


def test_tokens_are_counted_as_the_answer_counts_them(hermes: Any) -> None:
    body = {"tools": [WEATHER, ADD], "system": "Be brief."}
    counted = ask(hermes, "/count_tokens", **body).json()
    assert counted == {"input_tokens": ask(hermes, **body).json()["usage"]["input_tokens"]}
    assert ask(hermes, "/count_tokens", max_tokens=3).json()["error"]["param"] == "max_tokens"


def test_failures_have_a_status_before_and_an_event_after_the_first_token(bench: Any) -> None:
    bench.script.refuse = Overloaded("full", retry_after_s=1)
    assert ask(bench, stream=True).status_code == 503
    bench.script.refuse, bench.script.error, bench.script.fail_after = None, EngineError("broke"), 2
    last = events_of(ask(bench, stream=True))[-1]
    assert last["type"] == "error" and last["error"]["message"] == "broke"
    assert not bench.engine.live


def test_the_official_client(make_bench: Any, serve: Any) -> None:
    bench = make_bench(tool_format="hermes", max_model_len=4000, api_keys=("secret",))
    bench.script.text = HERMES
    url = f"http://{serve(bench)}"
    messages: Any = SAY
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        made = client.messages.create(model="tiny", max_tokens=400, messages=messages, tools=[WEATHER, ADD])
        assert [block.type for block in made.content] == ["text", "tool_use", "tool_use"]
        assert made.stop_reason == "tool_use"
        with client.messages.stream(model="tiny", max_tokens=400, messages=messages, tools=[WEATHER, ADD]) as stream:
            final = stream.get_final_message()
        assert [getattr(block, "input", None) for block in final.content] == [None, *(call[1] for call in CALLS)]
        assert final.usage.output_tokens == made.usage.output_tokens
        answered: Any = [{"role": "assistant", "content": final.content}]
        results: Any = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "ok"}
            for block in final.content
            if block.type == "tool_use"
        ]
        bench.script.text = "It is done."
        again = [*messages, *answered, {"role": "user", "content": results}]
        with client.messages.stream(model="tiny", max_tokens=20, messages=again, tools=[WEATHER, ADD]) as stream:
            assert "".join(stream.text_stream) == "It is done."
        assert client.messages.count_tokens(model="tiny", messages=messages).input_tokens > 0
        with pytest.raises(anthropic.BadRequestError, match="9000"):
            client.messages.create(model="tiny", max_tokens=9000, messages=messages)
        bench.script.error, bench.script.fail_after = EngineError("the engine broke"), 2
        with (
            pytest.raises(anthropic.APIStatusError, match="the engine broke"),
            client.messages.stream(model="tiny", max_tokens=20, messages=messages) as stream,
        ):
            stream.get_final_message()
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="tiny", max_tokens=9, messages=messages)
