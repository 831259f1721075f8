"""Event streams whose events have names, as those of /v1/responses and /v1/messages do."""

from __future__ import annotations

import json
from typing import Any


def events_of(response: Any) -> list[dict[str, Any]]:
    """The data of each event; asserts that its name is the data's type, and nothing else stands in the stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        kind, _, data = block.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events of /v1/messages make, as Anthropic's documentation puts them together.

    Asserts their order: start, blocks one after the other (start, deltas, stop), delta, stop.
    """
    message, ended = events[0]["message"], events[-2]
    assert events[0]["type"] == "message_start" and ended["type"] == "message_delta"
    assert events[-1] == {"type": "message_stop"}
    arguments: str | None = None  # of the block that is open
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert arguments is None and event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            arguments = ""
            continue
        block = message["content"][-1]
        assert arguments is not None and event["index"] == len(message["content"]) - 1
        if event["type"] == "content_block_stop":
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments)
            arguments = None
        else:
            assert event["type"] == "content_block_delta"
            if block["type"] == "tool_use":
                assert event["delta"].keys() == {"type", "partial_json"}
                arguments += event["delta"]["partial_json"]
            else:
                assert event["delta"].keys() == {"type", "text"}
                block["text"] += event["delta"]["text"]
    assert arguments is None, "a block was not closed"
    return message | ended["delta"] | {"usage": ended["usage"]}
