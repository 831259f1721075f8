"""Grammars of calls, walked at random: whatever may be written is read back as calls whose arguments fit the schema."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from byte_vocabulary import ByteVocabulary

from server.api.call_format import ANY_OBJECT, Tool, json_rule
from server.api.tool_formats import FORMATS
from server.api.tool_parser import CallArguments, CallStart, Content
from server.core import mask_bytes
from server.engine.notation import Constraint
from server.engine.structured import CompiledGrammar, GrammarCompiler

VOCABULARY = ByteVocabulary()
LENGTH = len(VOCABULARY)
LETTERS = {"type": "string", "maxLength": 3, "pattern": "^[a-z\"'\\\\\n]*$"}
NAMED: Any = {
    "type": "object",
    "properties": {
        "city": LETTERS,
        "sure": {"type": "boolean"},
        "count": {"anyOf": [{"type": "integer", "minimum": -9, "maximum": 9}, {"type": "null"}], "default": None},
        "more": {"$ref": "#/$defs/more"},
        "kind": {"enum": ["a", True, None]},
        "empty": {"type": ["null", "boolean"]},
    },
    "required": ["sure", "kind"],
    "additionalProperties": False,
    "$defs": {"more": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}
KEYS: Any = {
    "type": "object",
    "properties": {"a b": {"type": "boolean"}, "class": LETTERS},
    "required": ["a b"],
    "additionalProperties": False,
}
BOTH: Any = {"anyOf": [{**KEYS, "required": ["class"]}, {"type": "object", "additionalProperties": False}]}
NONE: Any = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [Tool("named", NAMED), Tool("get-keys", KEYS), Tool("both", BOTH), Tool("none", NONE)]
SCHEMAS = {tool.name: tool.schema for tool in TOOLS}


def compiled(text: str) -> CompiledGrammar:
    compiler = GrammarCompiler(VOCABULARY, vocab_size=LENGTH, eos_token_ids=[VOCABULARY.EOS])
    return asyncio.run(compiler.compile(Constraint("grammar", text, "tools")))


def walk(grammar: CompiledGrammar, rng: random.Random, *, max_tokens: int = 3000) -> str | None:
    """A text that the grammar allows; None where it did not end."""
    matcher, output = grammar.start(), list[int]()
    bits = torch.full((1, mask_bytes(LENGTH)), 0, dtype=torch.uint8)
    for _ in range(max_tokens):
        matcher.fill(output, [], [bits.data_ptr()])
        row = bits[0].tolist()
        allowed = [i for i in range(LENGTH) if row[i // 8] >> (i % 8) & 1]
        if allowed == [VOCABULARY.EOS] or (VOCABULARY.EOS in allowed and rng.random() < 0.5):
            return VOCABULARY.text(output)
        output.append(rng.choice([i for i in allowed if i != VOCABULARY.EOS]))
    return None


def read(form: str, text: str, names: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = FORMATS[form].parser(names)
    content, calls = "", list[tuple[str, str]]()
    for event in [*parser.feed(text), *parser.end()]:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


@pytest.mark.parametrize("form", FORMATS)
def test_forced_calls_are_read_back_and_fit_their_schemas(form: str) -> None:
    grammar = compiled(FORMATS[form].forced(TOOLS, parallel=True, controls={}))
    seen: set[str] = set()
    for seed in range(25):
        text = walk(grammar, random.Random(seed))
        assert text is not None
        content, calls = read(form, text, list(SCHEMAS))
        assert calls and not content, text
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        seen |= {name for name, _ in calls}
    assert seen == set(SCHEMAS)


@pytest.mark.parametrize("form", FORMATS)
def test_any_object_may_be_written(form: str) -> None:
    grammar = compiled(FORMATS[form].forced([Tool("f", ANY_OBJECT)], parallel=False, controls={}))
    found = [
        read(form, text, ["f"]) for seed in range(12) if (text := walk(grammar, random.Random(seed), max_tokens=400))
    ]
    assert found
    for content, calls in found:
        assert not content and len(calls) == 1 and isinstance(json.loads(calls[0][1]), dict)


def matches(grammar: CompiledGrammar, tokens: list[int]) -> bool:
    """Whether the tokens are a whole text of the grammar."""
    matcher, bits = grammar.start(), torch.full((1, mask_bytes(LENGTH)), 0, dtype=torch.uint8)
    for at in range(len(tokens) + 1):
        matcher.fill(tokens[:at], [], [bits.data_ptr()])
        wanted = tokens[at] if at < len(tokens) else VOCABULARY.EOS
        if not int(bits[0][wanted // 8]) >> (wanted % 8) & 1:
            return False
    return True


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('[named(sure=True, kind="a")]', True),
        ('[named(city="x", sure=False, count=None, more=[true], kind=true, empty=None)]', True),
        ('[named(kind="a", sure=True)]', False),  # the order is the schema's
        ("[named(sure=True)]", False),
        ('[named(sure=True, kind="a", other=1)]', False),
        ('[get-keys(**{"a b": true, "class": "x"})]', True),
        ("[none(), none()]", True),
        ("[none(x=1)]", False),
        ("none()", False),
    ],
)
def test_python_calls_by_a_schema(text: str, fits: bool) -> None:
    grammar = compiled(FORMATS["pythonic"].forced(TOOLS, parallel=True, controls={}))
    assert matches(grammar, VOCABULARY.encode(text)) == fits


def test_marks_that_are_control_tokens_are_written_as_such() -> None:
    controls = {"[TOOL_CALLS]": 0}
    form, tool = FORMATS["mistral11"], Tool("none", NONE)
    call = [0, *VOCABULARY.encode("none[ARGS]{}")]
    for text, together in ((form.forced([tool], parallel=True, controls=controls), False),
                           (form.optional([tool], parallel=True, controls=controls), True)):  # fmt: skip
        grammar = compiled(text)
        assert matches(grammar, call) and matches(grammar, call + call)
        assert matches(grammar, [*VOCABULARY.encode("I look. "), *call]) == together
        assert matches(grammar, VOCABULARY.encode("[TOOL_CALLS]none[ARGS]{}")) == together, "as text it is none"
        assert not matches(grammar, call[:-1])
    with_ids = compiled(form.forced([tool], parallel=False, controls={**controls, "[CALL_ID]": 0}))
    assert matches(with_ids, call)
    assert matches(with_ids, [0, *VOCABULARY.encode("none"), 0, *VOCABULARY.encode("a1b2c3d4e[ARGS]{}")])


@pytest.mark.parametrize("form", FORMATS)
def test_json_by_a_schema_or_calls(form: str) -> None:
    text = json_rule({"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"],
                      "additionalProperties": False})  # fmt: skip
    tools = [Tool("none", NONE), Tool("more", {**NONE, "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}})]
    grammar = compiled(FORMATS[form].optional(tools, parallel=False, controls={}, text=text))
    marked = form in ("hermes", "mistral11")
    call = FORMATS[form].write([("none", {})]).removeprefix("" if marked else FORMATS[form].opening)
    assert matches(grammar, VOCABULARY.encode(call)) and matches(grammar, VOCABULARY.encode('{"city": "Oslo"}'))
    assert not matches(grammar, VOCABULARY.encode("Oslo")) and not matches(grammar, VOCABULARY.encode('{"city": 1}'))
    assert read(form, '{"city": "Oslo"}', ["none"]) == ('{"city": "Oslo"}', [])


@pytest.mark.parametrize("form", FORMATS)
def test_text_or_calls(form: str) -> None:
    """Of a strict function: text as it comes, or the call; where the text begins a call, it has to be a right one."""
    grammar = compiled(FORMATS[form].optional([Tool("none", NONE)], parallel=False, controls={}))
    assert matches(grammar, VOCABULARY.encode("It is 5 < 6 (or so)."))
    marked = form in ("hermes", "mistral11")  # the others begin with the brace or bracket itself
    call = VOCABULARY.encode(FORMATS[form].write([("none", {})]).removeprefix("" if marked else FORMATS[form].opening))
    assert matches(grammar, call)
    assert not matches(grammar, VOCABULARY.encode(VOCABULARY.text(call).replace("none", "other")))
