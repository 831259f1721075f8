"""Calls as a list of Python's calls, [get_weather(city="Paris"), now()], as Llama 3.2 was trained to write them.

Not the reading of them (`server.api.pythonic_parser`). A forced call names its parameters in the order of the schema;
values are JSON, but True, False and None where a parameter may be just that. A schema that a list of parameters cannot
follow (a key that is no name of Python's, rules over several keys) has its arguments as f(**{...}).
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.call_format import ANY_OBJECT, DEFINITIONS, Tool, ToolFormat, json_rule, quoted, repeated
from server.api.pythonic_parser import PythonicParser
from server.api.tool_parser import ToolParser

MAX_PARAMETERS = 64  # written by name
_WORDS = {"title", "description", "default", "examples", "$schema", "$comment"}  # change nothing
_PLAIN = {"type", "properties", "required", "additionalProperties", *_WORDS, *DEFINITIONS}
_ANYTHING = [
    'anything: (parameter (", " parameter)*)?',
    'parameter: NAME "=" value',
    'value: STRING | NUMBER | "True" | "False" | "None" | list | dict',
    'list: "[" (value (", " value)*)? "]"',
    'dict: "{" (member (", " member)*)? "}"',
    'member: STRING ": " value',
    "NAME: /[a-zA-Z_][a-zA-Z0-9_]*/",
    r"""STRING: /"([^"\\\n]|\\["'\\nrt])*"/ | /'([^'\\\n]|\\["'\\nrt])*'/""",
    r"NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
]


@dataclass(frozen=True)
class PythonicCalls(ToolFormat):
    """The mark, where a model writes it, is not part of forced calls."""

    def forced(self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int]) -> str:
        """See `ToolFormat`."""
        return "\n".join(["start: calls", *_rules(tools, parallel)])

    def optional(
        self, tools: Sequence[Tool], *, parallel: bool, controls: Mapping[str, int], text: str | None = None
    ) -> str:
        """See `ToolFormat`."""
        return "\n".join([self._start(controls.get(self.opening), text, marked_calls=False), *_rules(tools, parallel)])

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """See `ToolFormat`."""
        return "[" + ", ".join(f"{name}({_parameters(arguments)})" for name, arguments in calls) + "]"

    def parser(self, names: Collection[str]) -> ToolParser:
        """See `ToolFormat`."""
        return PythonicParser(self.opening, self.closing, self.bare, names)


def _rules(tools: Sequence[Tool], parallel: bool) -> list[str]:
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    rules = [f'calls: "[" {repeated("call", ", ", parallel=parallel)} "]"', f"call: {names}"]
    for i, tool in enumerate(tools):
        rules += [f'call{i}: {quoted(tool.name + "(")} arguments{i} ")"', *_argument_rules(i, tool.schema)]
    return rules + _ANYTHING if any("anything" in rule for rule in rules) else rules


def _argument_rules(i: int, schema: dict[str, Any]) -> list[str]:
    if schema == ANY_OBJECT:
        return [f"arguments{i}: anything"]
    parameters = schema.get("properties", {})
    if not _by_name(schema, parameters):
        return [f'arguments{i}: "**" {json_rule(schema)}']
    definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
    # first{k}: parameters from the k-th on, where none was written yet; more{k}: where one was.
    rules = [f"arguments{i}: first{i}_0"]
    for k, (name, value) in enumerate(parameters.items()):
        rules.append(f"parameter{i}_{k}: {quoted(name + '=')} {_value_rule(value, definitions)}")
        if name in schema.get("required", ()):
            rules.append(f"first{i}_{k}: parameter{i}_{k} more{i}_{k + 1}")
            rules.append(f'more{i}_{k}: ", " parameter{i}_{k} more{i}_{k + 1}')
        else:
            rules.append(f"first{i}_{k}: parameter{i}_{k} more{i}_{k + 1} | first{i}_{k + 1}")
            rules.append(f'more{i}_{k}: (", " parameter{i}_{k})? more{i}_{k + 1}')
    return [*rules, f'first{i}_{len(parameters)}: ""', f'more{i}_{len(parameters)}: ""']


def _by_name(schema: Mapping[str, Any], parameters: Any) -> bool:
    """Whether the schema is one of named parameters, each with a schema that stands for itself."""
    return (
        schema.get("type") == "object"
        and schema.keys() <= _PLAIN
        and isinstance(schema.get("additionalProperties", True), bool)
        and isinstance(parameters, dict)
        and (bool(parameters) or not schema.get("additionalProperties", True))
        and len(parameters) <= MAX_PARAMETERS
        and all(_is_name(name) for name in parameters)
        and set(schema.get("required", ())) <= parameters.keys()
        and all(reference.startswith(("#/$defs/", "#/definitions/")) for reference in _references(parameters))
    )


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _references(schema: Any) -> list[str]:
    """All of a schema that is not nested too deeply, or one that fits nowhere."""
    found: list[str] = []
    level: list[Any] = [schema]
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                found += [str(value["$ref"])] if "$ref" in value else []
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner
    return found


def _value_rule(schema: Any, definitions: Mapping[str, Any]) -> str:
    if isinstance(schema, dict):
        says = {key: value for key, value in schema.items() if key not in _WORDS}
        kind = says.get("type")
        if says == {"type": "boolean"}:
            return '("True" | "False")'
        if says == {"type": "null"}:
            return '"None"'
        choices = says["anyOf"] if says.keys() == {"anyOf"} else None
        if isinstance(kind, list) and says.keys() == {"type"}:
            choices = [{"type": one} for one in kind]
        if isinstance(choices, list) and choices:
            return "(" + " | ".join(_value_rule(choice, definitions) for choice in choices) + ")"
    whole = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return json_rule({**whole, **definitions} if _references(schema) else whole)


def _parameters(arguments: Mapping[str, Any]) -> str:
    named = [f"{name}={_literal(value)}" for name, value in arguments.items() if _is_name(name)]
    others = {name: value for name, value in arguments.items() if not _is_name(name)}
    return ", ".join([*named, *([f"**{_literal(others)}"] if others else [])])


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
