"""Calls as Mistral's models from tokenizer 11 on write them: [TOOL_CALLS]name[ARGS]{...}, one mark for each call.

Tokenizer 11 writes [CALL_ID] and an id behind the name, 13 and later do not. Such ids are read and not kept: the server
gives every call its own, since models repeat theirs. Source: mistral_common's instruct tokenizers 11 and 13.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.call_format import Tool, ToolFormat, json_rule, quoted, repeated
from server.api.tool_parser import Nesting, ToolParser

CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
MAX_HEAD_CHARS = 400  # before the arguments
_NAME = re.compile(r"[A-Za-z0-9_-]*")
_HEAD = re.compile(r"([A-Za-z0-9_-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_-]+\s*)?(?:\[ARGS\]\s*)?")


@dataclass(frozen=True)
class NamedCalls(ToolFormat):
    """Marks are written as control tokens where the model has them, forced calls too, else as their text."""

    def forced(self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int]) -> str:
        """See `ToolFormat`."""
        return "\n".join(["start: calls", *self._rules(tools, parallel, controls)])

    def optional(
        self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int], text: str | None = None
    ) -> str:
        """See `ToolFormat`."""
        start = self._start(controls.get(self.opening), text, marked_calls=True)
        return "\n".join([start, *self._rules(tools, parallel, controls)])

    def _rules(self, tools: Sequence[Tool], parallel: bool, controls: Mapping[str, int]) -> list[str]:
        def mark(text: str) -> str:
            return f"<[{controls[text]}]>" if text in controls else quoted(text)

        names = " | ".join(f"call{i}" for i in range(len(tools)))
        rules = [f"calls: {repeated('call', '', parallel=parallel)}", f"call: {mark(self.opening)} ({names})"]
        call_id = f"({mark(CALL_ID)} /[a-zA-Z0-9]{{9}}/)?" if CALL_ID in controls else ""
        for i, tool in enumerate(tools):
            rules.append(f"call{i}: {quoted(tool.name)} {call_id} {mark(ARGS)} arguments{i}")
            rules.append(f"arguments{i}: {json_rule(tool.schema)}")
        return rules

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """See `ToolFormat`."""
        return "".join(
            f"{self.opening}{name}{ARGS}{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls
        )

    def parser(self, names: Collection[str]) -> ToolParser:
        """See `ToolFormat`."""
        return _Parser(self.opening, self.closing, self.bare, names)


class _Parser(ToolParser):
    """Behind a mark, a name and arguments, or objects as older tokenizers write them."""

    def _begins_call(self) -> bool | None:
        if self._held[0] == "{" or not self._skipped.rstrip().endswith(self._opening):
            return super()._begins_call()
        run = _NAME.match(self._held)
        name = "" if run is None else run[0]
        if name == self._held and any(offered.startswith(name) for offered in self._names):
            return None
        if name not in self._names:
            return False
        at = self._held.find("{", 0, MAX_HEAD_CHARS)
        if at < 0:
            return None if len(self._held) < MAX_HEAD_CHARS else False
        if _HEAD.fullmatch(self._held[:at]) is None:
            return False
        self._skipped, self._held = self._skipped + self._held[:at], self._held[at:]
        self._object, self._num_scanned = Nesting(), 1
        self._object.push("{")
        self._begin_arguments(name)
        return True
