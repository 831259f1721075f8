"""What every way of writing calls of functions has: its marks, a grammar, a parser, and the words of a prompt.

The ways themselves are in `json_calls`, `named_calls` and `pythonic_calls`, their list in `tool_formats`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.tool_parser import ToolParser
from server.engine.notation import Constraint, schema_rule

MAX_FORCED_CALLS = 16  # of one answer, or a model that likes calls would end at max_tokens
ANY_OBJECT: dict[str, Any] = {"type": "object"}
DEFINITIONS = ("$defs", "definitions")  # of a schema, for references
ANY_TEXT = r"(.|\n)"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called, and the JSON schema that its arguments must match."""

    name: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat(ABC):
    """One way. `controls` of its methods are the ids of those marks that are control tokens of the model."""

    name: str
    opening: str = ""  # mark before the calls; "" where a call begins the text
    closing: str = ""  # mark behind each call
    control_marks: tuple[str, ...] = ()  # marks that models have as control tokens, which text does not show
    bare: str = ""  # characters that begin calls at the start of a text, without the mark
    call_id_chars: int | None = None  # of the ids that its templates take; None: any number

    @abstractmethod
    def forced(self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int]) -> str:
        """A grammar in Lark's notation: one call of one of the tools, or several, and nothing else."""

    @abstractmethod
    def optional(
        self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int], text: str | None = None
    ) -> str:
        """The same, or text, or text and then calls where there is a mark between.

        `text` is the right side of a rule that all of the text must match; calls then stand alone.
        """

    @abstractmethod
    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls as the model would have written them: names and arguments."""

    def parser(self, names: Collection[str]) -> ToolParser:
        """For one answer; `names` are those of the functions that may be called."""
        return ToolParser(self.opening, self.closing, self.bare, names)

    def instructions(self, tools: Sequence[dict[str, Any]]) -> str:
        """A system message for a model whose template does not know of tools."""
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = self.write([("NAME", {"PARAMETER": "VALUE"})])
        return f"You may call these functions:\n{listed}\nTo call one, answer with nothing but:\n{example}"

    def _start(self, mark_id: int | None, text: str | None, *, marked_calls: bool) -> str:
        """The rule of text or calls. `marked_calls`: each call begins with the mark itself."""
        mark = self.opening.strip()
        if text is not None:
            marked = "" if marked_calls or mark_id is None else f" | <[{mark_id}]> calls"
            return f"start: text | calls{marked}\ntext: {text}"
        if marked_calls:
            spelled = re.escape(mark).replace("/", r"\/")
            free = f"/{ANY_TEXT}+/" + ("" if mark_id is not None else f" & ~/{ANY_TEXT}*{spelled}{ANY_TEXT}*/")
            return f"start: TEXT | TEXT? calls\nTEXT: {free}"
        marked = "" if mark_id is None else f" | TEXT? <[{mark_id}]> calls"
        return f"start: TEXT{marked} | calls\nTEXT: /[^{re.escape(self.bare)}]{ANY_TEXT}*/"


def repeated(rule: str, separator: str, *, parallel: bool) -> str:
    """The rule once, or several times where calls may be parallel."""
    between = f"{quoted(separator)} " if separator else ""
    return f"{rule} ({between}{rule}){{0,{MAX_FORCED_CALLS - 1}}}" if parallel else rule


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON by a schema, as the right side of a rule. Raises BadRequest for a schema that is too large."""
    return schema_rule(Constraint("json_schema", json.dumps(schema, ensure_ascii=False), "tools"))


def quoted(text: str) -> str:
    """A literal of Lark's."""
    return json.dumps(text, ensure_ascii=False)
