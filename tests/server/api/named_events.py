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
