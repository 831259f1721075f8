"""The chunks of a stream that carry text and nothing else, which is nearly all of them, without a model object each.

A chunk is made once by the response models, with a mark in place of the text; later ones are its two halves around the
text as JSON: 1 us instead of 9 (Zen 3). So the bytes are those the models would give.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from pydantic_core import to_json

from server.api.sse import event


class TextChunks:
    """Events of one stream. `make` builds the JSON of the chunk of an answer's index with a text."""

    def __init__(self, make: Callable[[int, str], bytes]) -> None:
        self._make = make
        self._halves: dict[int, tuple[bytes, bytes]] = {}

    def event(self, index: int, text: str) -> bytes:
        """The whole event with the answer's next text."""
        halves = self._halves.get(index)
        if halves is None:
            mark = uuid.uuid4().hex
            before, after = event(self._make(index, mark)).split(f'"{mark}"'.encode())
            halves = self._halves[index] = before, after
        return halves[0] + to_json(text) + halves[1]
