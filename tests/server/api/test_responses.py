"""/v1/responses: shapes, continuing, the store and its bound, events, refusals; with the official client too."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from server.api.chat_request import ChatMessage
from server.api.response_store import ResponseStore, StoredResponse
from server.errors import EngineError, NotFound, Overloaded
from tests.server.api.named_events import events_of


def respond(bench: Any, **body: Any) -> Any:
    return bench.post("/v1/responses", {"model": "tiny", "input": "say", **body})


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


def test_shape(bench: Any) -> None:
    body = respond(bench).json()
    assert body["id"].startswith("resp_") and body["output"][0]["id"].startswith("msg_")
    assert (body["object"], body["status"], body["model"], body["store"]) == ("response", "completed", "tiny", True)
    assert body["output"][0]["content"] == [
        {"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}
    ]
    assert body["usage"]["input_tokens"] == bench.chat().json()["usage"]["prompt_tokens"]
    assert (body["usage"]["output_tokens"], body["usage"]["output_tokens_details"]) == (12, {"reasoning_tokens": 0})
    assert body["incomplete_details"] is None and body["error"] is None
    assert prompt_text(bench) == "[user]say\n[assistant]"


def test_items_and_instructions(bench: Any) -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    assert respond(bench, input=items[1:], instructions="be brief").status_code == 200
    assert prompt_text(bench) == "[system]be brief\n[user]a\n[assistant]b\n[user]c\n[assistant]"
    assert respond(bench, input=items).json()["instructions"] is None


def test_an_answer_that_is_cut_is_incomplete(bench: Any) -> None:
    body = respond(bench, max_output_tokens=3).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == "hel"


def test_sampling_and_prompt_options_reach_the_engine(make_bench: Any) -> None:
    bench = make_bench(scheduling_policy="priority")
    body = respond(
        bench, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=4, stop="lo", ignore_eos=True, presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.1, priority=3, cache_salt="s", truncate_prompt_tokens=5,
    ).json()  # fmt: skip
    params, request = bench.params(), bench.engine.requests[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, 4)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (request.priority, request.cache_salt, len(request.prompt_ids)) == (3, "s", 5)
    assert body["output"][0]["content"][0]["text"] == "hel"
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)


def test_logprobs(bench: Any) -> None:
    body = respond(bench, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=2).json()
    entries = body["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["h", "e"]
    assert len(entries[0]["top_logprobs"]) == 2


def test_a_conversation_goes_on(bench: Any) -> None:
    first = respond(bench, input="one", instructions="old rules").json()
    second = respond(bench, input="two", instructions="new", previous_response_id=first["id"]).json()
    assert prompt_text(bench) == "[system]new\n[user]one\n[assistant]hello world\n[user]two\n[assistant]"
    respond(bench, input="three", previous_response_id=second["id"])
    assert prompt_text(bench).count("hello world") == 2
    assert "rules" not in prompt_text(bench), "instructions are of one response only"
    branch = respond(bench, input="other", previous_response_id=first["id"]).json()
    assert branch["previous_response_id"] == first["id"]
    assert "two" not in prompt_text(bench)


def test_kept_responses_are_read_and_deleted(bench: Any) -> None:
    made = respond(bench, metadata={"a": "b"}).json()
    path = f"/v1/responses/{made['id']}"
    assert bench.client.get(path).json() == made
    assert bench.client.delete(path).json() == {"id": made["id"], "object": "response", "deleted": True}
    assert bench.client.get(path).status_code == bench.client.delete(path).status_code == 404
    error = respond(bench, previous_response_id=made["id"]).json()["error"]
    assert (error["param"], error["code"]) == ("previous_response_id", "response_not_found")


def test_nothing_is_kept_where_nobody_wants_it(bench: Any, make_bench: Any) -> None:
    made = respond(bench, store=False).json()
    assert made["store"] is False
    assert bench.client.get(f"/v1/responses/{made['id']}").status_code == 404
    none = make_bench(response_store_bytes=0)
    made = respond(none).json()
    assert made["store"] is False
    assert none.client.get(f"/v1/responses/{made['id']}").status_code == 404
    assert respond(none, store=True).json()["error"]["param"] == "store"


def test_the_store_is_bounded_and_drops_the_least_recently_used() -> None:
    def response(size: int) -> StoredResponse:
        return StoredResponse(b"x" * size, (ChatMessage(role="user", content="é"),))

    store = ResponseStore(5000)
    for name in "abc":
        store.put(name, response(1000))
    assert store.num_bytes == 3 * 1502
    store.get("a")
    store.put("d", response(1000))
    assert [name for name in "abcd" if _kept(store, name)] == ["a", "c", "d"]
    store.put("huge", response(6000))
    assert not _kept(store, "huge") and store.num_bytes == 3 * 1502
    for name in "acd":
        store.delete(name)
    assert store.num_bytes == 0


def _kept(store: ResponseStore, name: str) -> bool:
    try:
        store.get(name)
    except NotFound:
        return False
    return True


def test_events(bench: Any) -> None:
    events = events_of(respond(bench, stream=True))
    kinds = [event["type"] for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in deltas) == "hello world"
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == "hello world"
    assert {final["output"][0]["id"]} == {event["item_id"] for event in deltas}
    assert (events[0]["response"]["status"], events[0]["response"]["usage"]) == ("in_progress", None)
    assert bench.client.get(f"/v1/responses/{final['id']}").json() == final
    assert events_of(respond(bench, stream=True, max_output_tokens=2))[-1]["type"] == "response.incomplete"


def test_a_failure_before_the_first_token_has_its_status_and_a_later_one_an_error(bench: Any) -> None:
    bench.script.refuse = Overloaded("full", retry_after_s=1)
    assert respond(bench, stream=True).status_code == 503
    bench.script.refuse, bench.script.error, bench.script.fail_after = None, EngineError("broke"), 2
    events = events_of(respond(bench, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    error = {"message": "broke", "type": "server_error", "param": None, "code": "engine_error"}
    last = {"type": "error", "code": "engine_error", "message": "broke", "param": None, "error": error}
    assert {**events[-1], "sequence_number": None} == {**last, "sequence_number": None}
    assert not any(event["type"] == "response.completed" for event in events)
    assert not bench.engine.live


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "message", "role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content"),
        ({"input": "\ud800"}, "input[0].content"),
        ({"input": "x" * 300}, "input"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 200}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"priority": 1}, "priority"),
    ],
)
def test_refusals(bench: Any, change: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "tiny", "input": "say", **change})
    response = bench.client.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": None, "background": False},
        {"text": {"format": {"type": "text"}}, "truncation": "disabled", "service_tier": "auto", "user": "u"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "metadata": None, "include": []},
    ],
)
def test_neutral_values_are_accepted(bench: Any, extra: dict[str, Any]) -> None:
    assert respond(bench, **extra).status_code == 200


def test_the_official_client(bench: Any, serve: Any) -> None:
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(model="tiny", input="one", instructions="rules")
        assert first.output_text == "hello world"
        assert first.usage is not None and first.usage.output_tokens == 12
        assert client.responses.retrieve(first.id).output_text == "hello world"
        with client.responses.stream(model="tiny", input="two", previous_response_id=first.id) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text == "hello world"
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="tiny", input="x", tools=[{"type": "web_search"}])
        assert caught.value.param == "tools[0].type" and "web_search" in str(caught.value)
        bench.script.error, bench.script.fail_after = EngineError("the engine broke"), 2
        with pytest.raises(openai.APIError, match="the engine broke"):
            list(client.responses.create(model="tiny", input="x", stream=True))


def test_a_response_belongs_to_the_key_that_made_it(make_bench: Any) -> None:
    bench = make_bench(api_keys=("alice=a", "bob=b"))
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in "ab")
    body = {"model": "tiny", "input": "say"}
    made = bench.post("/v1/responses", body, headers=alice).json()["id"]
    path = f"/v1/responses/{made}"
    assert bench.client.get(path, headers=bob).json()["error"]["code"] == "response_not_found"
    assert bench.client.delete(path, headers=bob).status_code == 404
    again = body | {"previous_response_id": made}
    assert bench.post("/v1/responses", again, headers=bob).json()["error"]["param"] == "previous_response_id"
    assert bench.post("/v1/responses", again, headers=alice).status_code == 200
    with bench.client.stream("POST", "/v1/responses", json=body | {"stream": True}, headers=bob) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("data: ")]
    streamed = json.loads(events[-1].removeprefix("data: "))["response"]["id"]
    assert bench.client.get(f"/v1/responses/{streamed}", headers=bob).status_code == 200
    assert bench.client.get(f"/v1/responses/{streamed}", headers=alice).status_code == 404
    assert bench.client.delete(path, headers=alice).status_code == 200
