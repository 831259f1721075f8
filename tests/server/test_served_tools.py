"""Tools on a real server: forced calls and those of strict functions always have arguments that follow their schema."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from live import Live, serve
from models import real_model

from server.api.tool_formats import FORMATS

BOOK: Any = {
    "type": "object",
    "$defs": {"seat": {"type": "string", "pattern": "^[0-9]{1,2}[A-F]$"}},
    "properties": {
        "to": {"enum": ["Oslo", "Rome", "Zürich"]},
        "seats": {"type": "array", "items": {"$ref": "#/$defs/seat"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["to", "seats"],
    "additionalProperties": False,
}
SUM: Any = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"],
            "additionalProperties": False}  # fmt: skip
SCHEMAS = {"book": BOOK, "sum": SUM}
MESSAGES: Any = [{"role": "user", "content": "It was a dark night"}]


def tools(strict: bool | None = None) -> Any:
    extra = {} if strict is None else {"strict": strict}
    return [
        {"type": "function", "function": {"name": name, "parameters": schema, **extra}}
        for name, schema in SCHEMAS.items()
    ]


@pytest.fixture(scope="module", params=FORMATS)
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serve(tool_format=request.param) as running:
        yield running
        assert running.is_idle()


def check_calls(message: Any) -> list[str]:
    """The names called; every call's arguments are right."""
    for call in message.tool_calls or ():
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in message.tool_calls or ()]


def ask(live: Live, **options: Any) -> Any:
    body = {"model": "demo", "messages": MESSAGES, "tools": tools(), "temperature": 1.3, "max_tokens": 500, **options}
    with live.client() as client:
        return client.chat.completions.create(**body)


def test_required_means_one_call_or_several(live: Live) -> None:
    for seed in range(3):
        choice = ask(live, tool_choice="required", seed=seed).choices[0]
        assert choice.finish_reason in ("tool_calls", "length")
        if choice.finish_reason == "tool_calls":
            assert 1 <= len(check_calls(choice.message)) <= 16
            assert choice.message.content is None


def test_required_without_parallel_calls_means_one(live: Live) -> None:
    answer = ask(live, tool_choice="required", parallel_tool_calls=False, n=4, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and len(check_calls(choice.message)) == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once(live: Live, name: str) -> None:
    named = {"type": "function", "function": {"name": name}}
    choice = ask(live, tool_choice=named, seed=2).choices[0]
    assert choice.finish_reason == "tool_calls" and check_calls(choice.message) == [name]


def test_a_forced_call_streams_its_arguments(live: Live) -> None:
    body: Any = {"model": "demo", "messages": MESSAGES, "tools": tools(), "max_tokens": 500, "seed": 4,
                 "tool_choice": {"type": "function", "function": {"name": "book"}}}  # fmt: skip
    with live.client() as client, client.chat.completions.stream(**body) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.get_final_completion().choices[0].message
    assert check_calls(message) == ["book"]
    assert "".join(pieces) == message.tool_calls[0].function.arguments  # type: ignore[index]
    assert len(pieces) > 3 or live.service.config.tool_format == "pythonic"  # which is handed on by whole calls


def test_forced_calls_of_responses(live: Live) -> None:
    flat = [{"type": "function", **tool["function"]} for tool in tools()]
    body: Any = {"model": "demo", "input": "It was a dark night", "tools": flat, "temperature": 1.3,
                 "max_output_tokens": 500, "parallel_tool_calls": False}  # fmt: skip
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sum"}]}
    with live.client() as client:
        for choice, names in (({"type": "function", "name": "book"}, {"book"}), (allowed, {"sum"})):
            response = client.responses.create(**body, tool_choice=choice, extra_body={"seed": 1})
            with client.responses.stream(**body, tool_choice=choice, extra_body={"seed": 1}) as stream:
                streamed = stream.get_final_response()
            for made in (response, streamed):
                for item in made.output:
                    assert item.type == "function_call" and item.name in names
                    jsonschema.validate(json.loads(item.arguments), SCHEMAS[item.name])
            assert response.output and response.status == "completed"


def test_strict_functions_may_be_called_and_then_rightly(live: Live) -> None:
    """The model writes text, as it was not trained to call; where it begins a call, it cannot but be a right one."""
    bias = begin_calls(live)
    reasons = set()
    for seed in range(4):
        options = {"logit_bias": bias} if seed % 2 else {}
        choice = ask(live, tools=tools(strict=True), seed=seed, parallel_tool_calls=False, max_tokens=200,
                     **options).choices[0]  # fmt: skip
        reasons.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            assert len(check_calls(choice.message)) == 1
        else:
            assert choice.message.content and not choice.message.tool_calls
    assert reasons & {"stop", "length"}
    if live.service.config.tool_format not in ("hermes", "mistral11"):  # whose marks have several tokens here
        assert "tool_calls" in reasons


def test_beside_tools_a_text_may_have_a_schema(live: Live) -> None:
    """An answer is JSON by it, or calls; forced, it is calls; what is wrong with the schema is said of it."""
    said: Any = {"type": "object", "properties": {"to": {"enum": ["sea", "land"]}}, "required": ["to"],
                 "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "said", "schema": said}}
    options: Any = {"tools": tools(strict=True), "response_format": wanted, "parallel_tool_calls": False}
    for seed in range(4):
        choice = ask(live, **options, seed=seed).choices[0]
        assert choice.finish_reason in ("stop", "tool_calls")
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), said)
        else:
            assert len(check_calls(choice.message)) == 1
    assert ask(live, **options, tool_choice="required", seed=1).choices[0].finish_reason == "tool_calls"
    wrong = {"type": "json_schema", "json_schema": {"name": "said", "schema": {"not": {}}}}
    body = {"messages": MESSAGES, "tools": tools(), "response_format": wanted | wrong}
    error = live.post("/v1/chat/completions", **body).json()["error"]
    assert error["param"] == "response_format.json_schema.schema", error


def begin_calls(live: Live) -> dict[str, int]:
    """A bias for the bracket or brace that a call begins with."""
    tokens = live.post("/tokenize", prompt="[{", add_special_tokens=False).json()["tokens"]
    return {str(token): 50 for token in tokens}


def test_an_unsupported_schema_is_refused_where_it_is_forced(live: Live) -> None:
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}}]
    body = {"messages": MESSAGES, "tools": wrong, "max_tokens": 10}
    for options in (
        {"tool_choice": "required"},
        {"tools": [{**wrong[0], "function": {**wrong[0]["function"], "strict": True}}]},
    ):
        answer = live.post("/v1/chat/completions", **{**body, **options})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "tools") and "uniqueItems" in error["message"]
    assert live.post("/v1/chat/completions", **body).status_code == 200


def test_ends_named_by_the_generation_config_alone_are_ends_too(tmp_path: Path) -> None:
    """As chat models have them: the configuration names one, and the turn ends by another."""
    folder = real_model("demo")
    assert folder is not None
    copy = tmp_path / "demo"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, 7, 10**6]}))
    with serve(copy) as live:
        assert live.service.engine is not None and live.service.engine.info.eos_token_ids == (1, 7)
        choice = live.complete(logit_bias={"7": 100}, temperature=0)
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
