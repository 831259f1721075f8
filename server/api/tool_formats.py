"""How models write calls of functions: what marks a call, what a forced one must look like, what a prompt says of it.

Not the reading of calls (`server.api.tool_parser`) and not the requests (`server.api.tools`). Each family was trained
on a form of its own, which its chat template shows; a model without one is told of the plain JSON form in a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_FORCED_CALLS = 16  # of one answer, or a model that likes calls would end at max_tokens


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form. A call is an object {"name": ..., `arguments`: {...}}, somewhere between the marks."""

    name: str
    opening: str  # mark before the calls; "" where a call begins the text
    closing: str  # mark behind each call
    arguments: str  # key
    separator: str  # between calls
    brackets: tuple[str, str] = ("", "")  # around all calls
    is_control: bool = False  # the mark is a control token, which text does not show
    bare: bool = True  # calls may stand at the start of the text without the mark

    def forced(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """A grammar in Lark's notation: one call of one of the tools, or several, and nothing else."""
        return "\n".join(["start: calls", *self._rules(tools, parallel, marked=not self.is_control)])

    def optional(self, tools: Sequence[Tool], *, parallel: bool, mark_id: int | None) -> str:
        """The same, or text, or text and then calls where there is a mark between. `mark_id`: of a control token."""
        if mark_id is not None:
            start = f"start: TEXT | TEXT? <[{mark_id}]> calls | calls\nTEXT: /[^\\[{{](.|\\n)*/"
        elif self.opening and not self.is_control:
            mark = self.opening.strip()
            start = f"start: TEXT | TEXT? calls\nTEXT: /(.|\\n)+/ & ~/(.|\\n)*{mark}(.|\\n)*/"
        else:
            start = "start: TEXT | calls\nTEXT: /[^\\[{](.|\\n)*/"
        return "\n".join([start, *self._rules(tools, parallel, marked=mark_id is None and not self.is_control)])

    def _rules(self, tools: Sequence[Tool], parallel: bool, *, marked: bool) -> list[str]:
        before, after = self.brackets
        opening, closing = (self.opening, self.closing) if marked else ("", "")
        more = f" ({_quote(self.separator)} call){{0,{MAX_FORCED_CALLS - 1}}}" if parallel else ""
        rules = [f"calls: {_quote(before)} call{more} {_quote(after)}"]
        names = " | ".join(f"call{i}" for i in range(len(tools)))
        rules.append(f"call: {_quote(opening)} ({names}) {_quote(closing)}")
        for i, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
            rules += [f'call{i}: {_quote(head)} arguments{i} "}}"', f"arguments{i}: {tool.arguments}"]
        return rules

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls as the model would have written them: names and arguments."""
        before, after = self.brackets
        objects = [
            f'{{"name": {json.dumps(name)}, "{self.arguments}": {json.dumps(arguments, ensure_ascii=False)}}}'
            for name, arguments in calls
        ]
        if before:
            return f"{self.opening}{before}{self.separator.join(objects)}{after}"
        return self.separator.join(f"{self.opening}{text}{self.closing}" for text in objects)

    def instructions(self, tools: Sequence[dict[str, Any]]) -> str:
        """A system message for a model whose template does not know of tools."""
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = self.write([("NAME", {"PARAMETER": "VALUE"})])
        return f"You may call these functions:\n{listed}\nTo call one, answer with nothing but:\n{example}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called; `arguments` is what they must match, in Lark's notation."""

    name: str
    arguments: str


FORMATS = {
    form.name: form
    for form in (
        ToolFormat("json", "", "", "arguments", ", ", ("[", "]")),
        ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", "arguments", "\n", bare=False),
        ToolFormat("llama3", "<|python_tag|>", "", "parameters", "; ", is_control=True),
        ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", ", ", ("[", "]"), is_control=True),
    )
}
NAMES = tuple(FORMATS)


def detect(template: str) -> ToolFormat:
    """The format that a chat template writes; plain JSON where it writes none that is known here."""
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if "<|python_tag|>" in template or re.search(r'\{"name": function name, "parameters"', template):
        return FORMATS["llama3"]
    return FORMATS["json"]


def knows_tools(template: str) -> bool:
    """Whether a chat template shows the model which tools there are."""
    return re.search(r"\btools\b", template) is not None


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
