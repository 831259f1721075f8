"""Calls as JSON objects {"name": ..., "arguments": {...}}, alone, in a list, or each between marks.

Not the reading of them (`server.api.tool_parser`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.call_format import DEFINITIONS, Tool, ToolFormat, json_rule, quoted, repeated


@dataclass(frozen=True)
class JsonCalls(ToolFormat):
    """Objects somewhere between the marks. Those that are control tokens are left out where a call is forced."""

    arguments: str = "arguments"  # key
    separator: str = ", "  # between calls
    brackets: tuple[str, str] = ("", "")  # around all calls

    def forced(self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int]) -> str:
        """See `ToolFormat`."""
        return "\n".join(["start: calls", *self._rules(tools, parallel)])

    def optional(
        self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int], text: str | None = None
    ) -> str:
        """See `ToolFormat`."""
        start = self._start(controls.get(self.opening), text, marked_calls=self._is_marked)
        beside_objects = text is not None and not self._is_marked and not self.brackets[0]
        return "\n".join([start, *self._rules(tools, parallel, as_json=beside_objects)])

    @property
    def _is_marked(self) -> bool:
        return bool(self.opening) and not self.control_marks

    def _rules(self, tools: Sequence[Tool], parallel: bool, *, as_json: bool = False) -> list[str]:
        """`as_json`: text may begin with a brace too. Matching cuts what it reads by the longest piece that fits, so a
        call has to be cut as JSON is.
        """
        before, after = self.brackets
        opening, closing = (self.opening, self.closing) if self._is_marked else ("", "")
        several = repeated("call", self.separator, parallel=parallel)
        names = " | ".join(f"call{i}" for i in range(len(tools)))
        rules = [
            f"calls: {quoted(before)} {several} {quoted(after)}",
            f"call: {quoted(opening)} ({names}) {quoted(closing)}",
        ]
        for i, tool in enumerate(tools):
            if as_json:
                rules.append(f"call{i}: {json_rule(self._schema(tool))}")
                continue
            head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
            rules += [f'call{i}: {quoted(head)} arguments{i} "}}"', f"arguments{i}: {json_rule(tool.schema)}"]
        return rules

    def _schema(self, tool: Tool) -> dict[str, Any]:
        shared = {key: tool.schema[key] for key in DEFINITIONS if key in tool.schema}  # where references look for them
        parts = {"name": {"const": tool.name}, self.arguments: tool.schema}
        return {"type": "object", "properties": parts, "required": [*parts], "additionalProperties": False, **shared}

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """See `ToolFormat`."""
        before, after = self.brackets
        objects = [
            f'{{"name": {json.dumps(name)}, "{self.arguments}": {json.dumps(arguments, ensure_ascii=False)}}}'
            for name, arguments in calls
        ]
        if before:
            return f"{self.opening}{before}{self.separator.join(objects)}{after}"
        return self.separator.join(f"{self.opening}{text}{self.closing}" for text in objects)
