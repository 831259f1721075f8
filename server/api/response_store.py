"""Responses that may be asked for again or continued: in memory, bounded in bytes, the least recently used go first.

They are gone with the process. Each belongs to the API key it was made with: to others it is not there. Where there are
no keys, an id is 128 random bits, and whoever knows one may read, continue or delete its response.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from server.api.chat_request import ChatMessage
from server.errors import NotFound


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A finished response: its body, and the conversation that it ends, without instructions."""

    body: bytes
    messages: tuple[ChatMessage, ...]
    key: str | None = None  # name of the API key it belongs to

    @property
    def num_bytes(self) -> int:
        """What it counts for: its text, and some for the objects around."""
        calls = [call for message in self.messages for call in message.tool_calls or ()]
        texts = [message.content or "" for message in self.messages] + [call.function.arguments for call in calls]
        return len(self.body) + sum(len(text.encode()) + 500 for text in texts)


class ResponseStore:
    """Holds at most `max_bytes`; 0: nothing is kept. Used on the event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response, at the cost of the least recently used; one larger than the bound is not kept."""
        if response.num_bytes > self.max_bytes:
            return
        self._responses[response_id] = response
        self.num_bytes += response.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._responses.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, response_id: str, key: str | None = None, *, param: str | None = None) -> StoredResponse:
        """A response of this key that is kept; `param` names the field that asked. Raises NotFound."""
        found = self._responses.get(response_id)
        if found is None or found.key != key:
            raise NotFound(
                f"no response {ascii(response_id)[:80]} is kept: not stored, deleted, or dropped for newer ones",
                param=param,
                code="response_not_found",
            )
        self._responses.move_to_end(response_id)
        return found

    def delete(self, response_id: str, key: str | None = None) -> None:
        """Forget a response of this key. Raises NotFound."""
        self.num_bytes -= self.get(response_id, key).num_bytes
        del self._responses[response_id]
