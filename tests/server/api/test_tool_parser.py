"""Finding calls in text: every form, cut at every place, and text that only looks like a call."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.tool_formats import FORMATS, detect, knows_tools
from server.api.tool_parser import CallArguments, CallStart, Content

NAMES = ("get_weather", "add", "f")
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text('a"\\{}[]é\n;', max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text('k"}', max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text("ab}", max_size=3), VALUES, max_size=3)),
                 min_size=1, max_size=3)  # fmt: skip


def read(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and calls as name and arguments."""
    parser = FORMATS[form].parser(NAMES)
    content, calls = "", list[tuple[str, str]]()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.end():
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            calls.append((event.name, ""))
        else:
            assert isinstance(event, CallArguments)
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert parser.num_calls == len(calls)
    return content, calls


def chop(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(8, len(text)))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=60, deadline=None)
@given(CALLS, st.randoms(use_true_random=False), st.sampled_from(["", "Let me see.\n"]))
def test_what_a_form_writes_is_read_back(form: str, calls: Any, rng: random.Random, before: str) -> None:
    marked = form in ("hermes", "mistral", "mistral11")
    text = (before if marked else "") + FORMATS[form].write(calls)
    content, found = read(form, chop(text, rng))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert content.strip() == (before.strip() if marked else "")


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=100, deadline=None)
@given(st.text('{}[]"\\:;, \nnamef<tool_call>/|', max_size=60), st.randoms(use_true_random=False))
def test_text_without_a_call_comes_out_as_it_is(form: str, text: str, rng: random.Random) -> None:
    content, calls = read(form, chop(text, rng))
    assert calls == []
    mark = FORMATS[form].opening.strip()
    if not (mark and mark in text):
        assert content == text
    assert read(form, list(text)) == (content, calls), "where pieces end makes a difference"


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=100, deadline=None)
@given(CALLS, st.lists(st.tuples(st.floats(0, 1), st.text("{}[]()'\"=,f1\\ \n", max_size=2)), max_size=3),
       st.randoms(use_true_random=False))  # fmt: skip
def test_damaged_calls_read_alike_however_they_are_cut(
    form: str, calls: Any, damage: list[tuple[float, str]], rng: random.Random
) -> None:
    text = FORMATS[form].write(calls)
    for place, put in damage:
        at = int(place * len(text))
        text = text[:at] + put + text[at + 1 :]
    content, found = read(form, [text])
    assert read(form, chop(text, rng)) == read(form, list(text)) == (content, found)
    if form == "pythonic":
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in found), "handed on whole"
    mark = FORMATS[form].opening.strip()
    if not found and not (mark and mark in text):
        assert content == text


CASES: list[tuple[str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("hermes", 'Sure <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Sure", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call> done', "done", [("f", {})]),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("llama3", '{"name": "f", "parameters": {"a": "}"}}', "", [("f", {"a": "}"})]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "add", "parameters": {"x": [1]}}', "",
     [("f", {}), ("add", {"x": [1]})]),
    ("llama3", 'Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]', "",
     [("f", {"a": 1}), ("add", {})]),
    ("mistral", 'Hm. [TOOL_CALLS][{"name": "f", "arguments": {}}]', "Hm.", [("f", {})]),
    ("mistral11", 'Hm. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{}', "Hm.",
     [("f", {"a": 1}), ("add", {})]),
    ("mistral11", '[TOOL_CALLS] f {"a": {"b": "}"}} done', "done", [("f", {"a": {"b": "}"}})]),
    ("mistral11", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [("f", {"a": 1})]),
    ("mistral11", '[TOOL_CALLS]unknown[ARGS]{"a": 1}', '[TOOL_CALLS]unknown[ARGS]{"a": 1}', []),
    ("mistral11", '[TOOL_CALLS]f is what I would call {}', '[TOOL_CALLS]f is what I would call {}', []),
    ("mistral11", 'f[ARGS]{"a": 1}', 'f[ARGS]{"a": 1}', []),
    ("pythonic", "[get_weather(city='San Francisco', metric=\"it's\"), f()]", "",
     [("get_weather", {"city": "San Francisco", "metric": "it's"}), ("f", {})]),
    ("pythonic", "\n[f(a=None, b=[True, False], c={'x': (1, -2.5)}, d='a\\'b\\n',)]", "",
     [("f", {"a": None, "b": [True, False], "c": {"x": [1, -2.5]}, "d": "a'b\n"})]),
    ("pythonic", "<|python_tag|>f(a=1); add(x=[1])", "", [("f", {"a": 1}), ("add", {"x": [1]})]),
    ("pythonic", "I look.<|python_tag|>[f(a=')]')]", "I look.", [("f", {"a": ")]"})]),
    ("pythonic", "[f(**{'a b': 1}, c=2)] done", "done", [("f", {"a b": 1, "c": 2})]),
    ("pythonic", "[f(a=city)]", "[f(a=city)]", []),
    ("pythonic", "[f('Paris')]", "[f('Paris')]", []),
    ("pythonic", "[f(a=1) for a in x]", "[f(a=1) for a in x]", []),
    ("pythonic", "[f(a=1)", "", [("f", {"a": 1})]),
    ("pythonic", "[f(a=1", "[f(a=1", []),
    ("pythonic", "[f(a=1), unknown(b=2)]", "unknown(b=2)]", [("f", {"a": 1})]),
    ("pythonic", "[f(a=1), ad", "ad", [("f", {"a": 1})]),
    ("pythonic", "f(a=1)", "f(a=1)", []),
    ("pythonic", "[1] and [2]", "[1] and [2]", []),
    ("json", '\n {"name": "f", "arguments": {"a": null}}', "", [("f", {"a": None})]),
    ("json", '[1, 2, {"a": 3}]', '[1, 2, {"a": 3}]', []),
    ("json", '{"answer": 42} and more', '{"answer": 42} and more', []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_examples(form: str, text: str, content: str, calls: Any) -> None:
    for pieces in ([text], list(text)):
        got, found = read(form, pieces)
        assert (got, [(name, json.loads(arguments)) for name, arguments in found]) == (content, calls)


def test_arguments_are_handed_on_before_the_call_is_complete() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    assert parser.feed('<tool_call>\n{"name": "f", "argu') == []
    assert parser.feed('ments": {"city": "Par') == [CallStart("f"), CallArguments('{"city": "Par')]
    assert parser.feed('is"') == [CallArguments('is"')]
    assert parser.feed("}}\n</tool_") == [CallArguments("}")]
    assert parser.end() == []


def test_a_call_that_was_cut_keeps_what_came() -> None:
    assert read("json", ['{"name": "f", "arguments": {"a": 1']) == ("", [("f", '{"a": 1')])
    assert read("json", ['{"name": "f"']) == ('{"name": "f"', [])


def test_formats_are_known_by_their_templates() -> None:
    assert detect("{% for t in tools %}[AVAILABLE_TOOLS]{% endfor %}[TOOL_CALLS]").name == "mistral"
    assert detect("[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments }}").name == "mistral11"
    assert detect("<tool_call>\n{{ tools }}").name == "hermes"
    assert detect("respond in the format [func_name1(params_name1=params_value1...)]").name == "pythonic"
    assert detect('Respond in the format {"name": function name, "parameters": {}}').name == "llama3"
    assert detect("{{ messages }}").name == "json"
    assert knows_tools("{% if tools is not none %}") and not knows_tools("{{ messages }} [TOOL_CALLS]")
