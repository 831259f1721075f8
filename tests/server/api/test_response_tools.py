"""Tools in /v1/responses on scripted answers: items, events, the conversation that they make, refusals, the client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from server.api.tool_formats import FORMATS
from tests.server.api.named_events import events_of

PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "Weather of a city",
                "parameters": PARAMETERS, "strict": False}  # fmt: skip
ADD: Any = {"type": "function", "name": "add", "parameters": None, "strict": None}
CALLS = [("get_weather", {"city": "Paris, é"}), ("add", {"x": [1, {"y": None}]})]
HERMES = "Let me look.\n" + FORMATS["hermes"].write(CALLS) + "\nSoon."


def respond(bench: Any, **body: Any) -> Any:
    return bench.post("/v1/responses", {"model": "tiny", "input": "say", "tools": [WEATHER, ADD], **body})


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


@pytest.fixture
def hermes(make_bench: Any) -> Any:
    bench = make_bench(tool_format="hermes", max_model_len=4000)
    bench.script.text = HERMES
    return bench


@pytest.mark.parametrize("form", FORMATS)
def test_calls_are_items_in_every_form(make_bench: Any, form: str) -> None:
    bench = make_bench(tool_format=form, max_model_len=4000)
    bench.script.text = FORMATS[form].write(CALLS)
    body = respond(bench).json()
    assert body["status"] == "completed"
    assert [(i["type"], i["status"], i["name"], json.loads(i["arguments"])) for i in body["output"]] == [
        ("function_call", "completed", name, arguments) for name, arguments in CALLS
    ]
    assert len({i["call_id"] for i in body["output"]} | {i["id"] for i in body["output"]}) == 4
    assert all(i["id"].startswith("fc_") for i in body["output"])
    if form.startswith("mistral"):
        assert all(len(i["call_id"]) == 9 for i in body["output"]), "its templates refuse others"


def test_text_beside_calls_is_messages_around_them(hermes: Any) -> None:
    output = respond(hermes).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
    assert [output[i]["content"][0]["text"] for i in (0, 3)] == ["Let me look.", "Soon."]


def test_events_come_in_order_and_make_the_same_output(hermes: Any) -> None:
    events = events_of(respond(hermes, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    folded = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
               "content_part.done", "output_item.done"]  # fmt: skip
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert folded == ["created", "in_progress", *message, *call, *call, *message, "completed"]
    final = events[-1]["response"]
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        added, done = own[0]["item"], own[-1]["item"]
        assert done == item and added["id"] == item["id"] and added["status"] == "in_progress"
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
        deltas = [event["delta"] for event in own if event["type"].endswith(".delta")]
        if item["type"] == "function_call":
            assert (added["arguments"], added["call_id"], added["name"]) == ("", item["call_id"], item["name"])
            assert "".join(deltas) == item["arguments"] == own[-2]["arguments"] and len(deltas) > 2
        else:
            assert added["content"] == [] and "".join(deltas) == item["content"][0]["text"]
    assert hermes.client.get(f"/v1/responses/{final['id']}").json() == final


def test_an_answer_without_a_call_is_one_message(hermes: Any) -> None:
    for text in ("It is 5 < 6", ""):
        hermes.script.text = text
        [item] = respond(hermes).json()["output"]
        assert item["content"][0]["text"] == text
        events = events_of(respond(hermes, stream=True))
        assert events[-1]["response"]["output"][0]["content"] == item["content"]
        assert sum(event["type"] == "response.output_item.added" for event in events) == 1


def test_a_call_that_is_cut_is_incomplete_and_cannot_be_continued(make_bench: Any) -> None:
    bench = make_bench(max_model_len=4000)
    bench.script.text = FORMATS["json"].write(CALLS[:1])
    cut = '[{"name": "get_weather", "arguments": {"cit'
    body = respond(bench, max_output_tokens=len(cut)).json()
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
    assert body["output"][0]["arguments"] == '{"cit'
    events = events_of(respond(bench, max_output_tokens=len(cut), stream=True))
    assert events[-1]["type"] == "response.incomplete" and events[-2]["item"]["status"] == "incomplete"
    result = {"type": "function_call_output", "call_id": body["output"][0]["call_id"], "output": "x"}
    error = respond(bench, input=[result], previous_response_id=body["id"]).json()["error"]
    assert error["param"] == "previous_response_id"


@pytest.mark.parametrize("by_id", [True, False])
def test_results_continue_the_conversation(make_bench: Any, by_id: bool) -> None:
    """By the id of the response, or by its items sent back as they came."""
    bench = make_bench(tool_format="json", max_model_len=4000)
    bench.script.text = FORMATS["json"].write(CALLS)
    first = respond(bench).json()
    calls = first["output"]
    results = [
        {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "rain"},
        {"type": "function_call_output", "call_id": calls[1]["call_id"],
         "output": [{"type": "input_text", "text": "2"}, {"type": "input_text", "text": "3"}]},
    ]  # fmt: skip
    said = {"type": "message", "role": "user", "content": "say"}
    more = {"input": results, "previous_response_id": first["id"]} if by_id else {"input": [said, *calls, *results]}
    bench.script.text = "It rains."
    second = respond(bench, **more).json()
    assert second["output"][0]["content"][0]["text"] == "It rains."
    text = prompt_text(bench)
    turn = "[user]say\n[assistant]" + FORMATS["json"].write(CALLS)
    assert text.endswith(f"{turn}\n[user]get_weather returned: rain\n[user]add returned: 2\n3\n[assistant]"), text
    respond(bench, input="and?", previous_response_id=second["id"])
    assert prompt_text(bench).count("It rains.") == 1


def test_stored_calls_count_for_the_bound(make_bench: Any) -> None:
    bench = make_bench(max_model_len=4000)
    bench.script.text = FORMATS["json"].write([("add", {"x": "y" * 1000})])
    store = bench.client.app.state.responses
    made = respond(bench).json()
    assert store.num_bytes >= len(json.dumps(made).encode()) + 1000
    bench.client.delete(f"/v1/responses/{made['id']}")
    assert store.num_bytes == 0


def test_the_response_repeats_what_was_asked(make_bench: Any) -> None:
    bench = make_bench(max_model_len=4000)
    body = respond(bench, parallel_tool_calls=True).json()
    assert body["tools"][0] == WEATHER
    assert body["tools"][1] == {"type": "function", "name": "add", "description": None, "parameters": None,
                                "strict": False}  # fmt: skip
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("auto", True)
    assert json.dumps({"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}) in (
        prompt_text(bench)
    )
    assert respond(bench, tool_choice="none").json()["tool_choice"] == "none"
    assert "get_weather" not in prompt_text(bench)


def test_logprobs_are_those_of_the_text_alone(hermes: Any) -> None:
    asked = {"include": ["message.output_text.logprobs"]}
    output = respond(hermes, **asked).json()["output"]
    tokens = ["".join(entry["token"] for entry in output[i]["content"][0]["logprobs"]) for i in (0, 3)]
    assert tokens[0].startswith("Let me look.") and "get_weather" not in "".join(tokens)
    final = events_of(respond(hermes, stream=True, **asked))[-1]["response"]["output"]
    assert [final[i]["content"] for i in (0, 3)] == [output[i]["content"] for i in (0, 3)]


@pytest.mark.parametrize(
    ("change", "param", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "mcp"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "pattern"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading", "not support"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "no tool"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "web_search"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
         "tool_choice.tools[0].type", "function"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}},
         "tool_choice", "no tool"),
        ({"max_tool_calls": 3}, "max_tool_calls", "not support"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id", "no call"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "input[0].arguments",
         "JSON object"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "missing"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"}]},
         "input[0].namespace", "not support"),
        ({"input": [{"role": "user", "content": "x", "phase": "final_answer"}]}, "input[0].phase", "not support"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
         "input[1].output", "not served"),
    ],
)  # fmt: skip
def test_refusals(bench: Any, change: dict[str, Any], param: str, word: str) -> None:
    response = respond(bench, **change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and word in error["message"], error
    assert bench.engine.requests == []


def test_the_official_client(make_bench: Any, serve: Any) -> None:
    bench = make_bench(tool_format="hermes", max_model_len=4000)
    bench.script.text = HERMES
    asked: Any = {"model": "tiny", "input": "say", "tools": [WEATHER, ADD]}
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        made = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
            streamed = stream.get_final_response()
        assert json.loads(deltas[-1].snapshot) == CALLS[1][1]
        for response in (made, streamed):
            calls = [item for item in response.output if item.type == "function_call"]
            assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
            assert response.output_text == "Let me look.Soon."
        results: Any = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
            for item in made.output
            if item.type == "function_call"
        ]
        bench.script.text = "It rains."
        history: Any = [{"role": "user", "content": "say"}, *made.output, *results]
        assert client.responses.create(**{**asked, "input": history}).output_text == "It rains."
        assert "get_weather returned: rain" in prompt_text(bench)
        text = prompt_text(bench)
        client.responses.create(**{**asked, "input": results}, previous_response_id=made.id)
        assert prompt_text(bench) == text, "the same conversation either way"


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: str


def test_parsed_arguments(make_bench: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(tool_format="hermes", max_model_len=4000)
    bench.script.text = FORMATS["hermes"].write([("Weather", {"city": "Oslo"})])
    asked = []

    async def compile_constraint(body: Any, service: Any, tools: Any = None) -> None:
        asked.append(tools)

    monkeypatch.setattr("server.api.conversation.compile_constraint", compile_constraint)
    tool: Any = openai.pydantic_function_tool(Weather)["function"]
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        response = client.responses.parse(model="tiny", input="say", tools=[{"type": "function", **tool}])
        [call] = response.output
        assert call.type == "function_call" and call.parsed_arguments == {"city": "Oslo"}
    assert asked[0] is not None and asked[0].param == "tools", "a strict function is called under a grammar"
