"""Structured output through a real server: what comes out matches whatever the model wants, and nobody else pays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live, serve

Schema = dict[str, Any]

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[{}, {"speculative_ngram": 4, "kv_memory": 700 * 1024}], ids=["plain", "tight"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    """Once as it is, once with speculation and so little cache that sequences are preempted."""
    with serve(**request.param) as running:
        yield running
        assert running.is_idle()


def by_schema(schema: Schema, strict: bool | None = True) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    }


def strings() -> st.SearchStrategy[Schema]:
    bounds = st.builds(
        lambda low, more: {"minLength": low, "maxLength": low + more}, st.integers(0, 4), st.integers(0, 5)
    )
    patterns = st.sampled_from(["^[a-c]{2,4}$", "^x?[0-9]{3}$", "^(ab|cd)$", "^é{1,2}$"]).map(lambda p: {"pattern": p})
    formats = st.sampled_from(["date", "time", "date-time", "ipv4", "uuid"]).map(lambda f: {"format": f})
    return st.one_of(bounds, patterns, formats).map(lambda s: {"type": "string", **s})


def numbers() -> st.SearchStrategy[Schema]:
    integers = st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 100),
    )
    exclusive = st.builds(
        lambda low, more: {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + more},
        st.integers(-5, 5),
        st.integers(2, 9),
    )
    multiples = st.integers(2, 9).map(lambda m: {"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": m})
    reals = st.just({"type": "number", "minimum": -1.5, "maximum": 2.25})
    return st.one_of(integers, exclusive, multiples, reals)


def leaves() -> st.SearchStrategy[Schema]:
    values = st.lists(st.one_of(st.integers(-9, 9), st.text("ab'\"\\ é\n😀", max_size=3), st.none(), st.booleans()),
                      min_size=1, max_size=3)  # fmt: skip
    enums = st.one_of(values.map(lambda v: {"enum": v}), values.map(lambda v: {"const": v[0]}))
    return st.one_of(strings(), numbers(), enums, st.just({"type": ["boolean", "null"]}))


def extend(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def to_object(properties: dict[str, Schema], num_required: int) -> Schema:
        required = list(properties)[:num_required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    names = st.text('abcé "', min_size=1, max_size=4)
    objects = st.builds(to_object, st.dictionaries(names, inner, max_size=3), st.integers(0, 3))
    arrays = st.builds(
        lambda item, low, more: {"type": "array", "items": item, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    tuples = st.lists(inner, min_size=1, max_size=2).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    either = st.lists(inner, min_size=2, max_size=3).map(lambda parts: {"anyOf": parts})
    referred = inner.map(
        lambda s: {"$defs": {"part": s}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}
    )
    return st.one_of(objects, arrays, tuples, either, referred)


def fits(schema: Schema) -> bool:
    """A `$defs` counts only at the root of a schema that references by `#/$defs`."""
    rest = {name: value for name, value in schema.items() if name != "$defs"}
    text = json.dumps([rest, *schema.get("$defs", {}).values()])
    return '"$defs"' not in text and text.count("#/$defs") <= 1


SCHEMAS = st.recursive(leaves(), extend, max_leaves=5).filter(fits)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(SCHEMAS, st.integers(0, 2**31)), min_size=6, max_size=6))
def test_what_ends_validates_against_its_schema(live: Live, asked: list[tuple[Schema, int]]) -> None:
    def ask(schema: Schema, seed: int) -> Any:
        return live.complete(seed=seed, temperature=1.5, max_tokens=160, **by_schema(schema))

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: ask(*a), asked))
    for (schema, _), answer in zip(asked, answers, strict=True):
        assert answer["finish_reason"] in ("stop", "length")
        if answer["finish_reason"] == "stop":
            jsonschema.Draft202012Validator(schema, format_checker=None).validate(json.loads(answer["text"]))


def test_answers_do_end(live: Live) -> None:
    texts = [live.complete(seed=seed, max_tokens=300, **by_schema(PERSON)) for seed in range(3)]
    assert [text["finish_reason"] for text in texts] == ["stop"] * 3, "the property above must not hold of nothing"
    for text in texts:
        jsonschema.validate(json.loads(text["text"]), PERSON)


def test_the_other_kinds(live: Live) -> None:
    assert live.complete(guided_choice=["yes", "no", "é😀"])["text"] in ("yes", "no", "é😀")
    assert re.fullmatch(r"[0-9]{3}-x+", live.complete(guided_regex="[0-9]{3}-x{1,5}")["text"])
    assert re.fullmatch("a(b|c){1,3}d", live.complete(guided_grammar='start: "a" /[bc]{1,3}/ "d"')["text"])
    gbnf = live.complete(structured_outputs={"grammar": 'root ::= "<" item "," item ">"\nitem ::= [0-9] | "none"'})
    assert re.fullmatch("<([0-9]|none),([0-9]|none)>", gbnf["text"])
    assert isinstance(json.loads(live.complete(guided_json=json.dumps({"enum": [3, None, {"a": [1]}]}))["text"] + " "),
                      int | dict | None)  # fmt: skip
    assert live.complete(structured_outputs={"regex": "  b"})["text"] == "  b", "a space at the start is part of it"
    tight = live.complete(structured_outputs={"json": PERSON, "disable_any_whitespace": True}, max_tokens=300)
    assert json.dumps(json.loads(tight["text"]), separators=(",", ":"), ensure_ascii=False) == tight["text"]
    wide = live.complete(structured_outputs={"json": {"const": [1, 2]}, "whitespace_pattern": "~*"})
    assert re.fullmatch(r"\[~*1~*,~*2~*\]", wide["text"])


def test_json_mode_gives_an_object_or_the_beginning_of_one(live: Live) -> None:
    for seed in range(3):
        answer = live.complete(seed=seed, max_tokens=60, response_format={"type": "json_object"})
        assert answer["text"].lstrip().startswith("{")
        assert answer["finish_reason"] == "length" or isinstance(json.loads(answer["text"]), dict)


def test_a_cut_answer_says_length(live: Live) -> None:
    answer = live.complete(max_tokens=4, **by_schema({"type": "string", "minLength": 200}))
    assert answer["finish_reason"] == "length" and answer["text"].startswith('"')


def test_stop_strings_and_logprobs_and_n_go_with_it(live: Live) -> None:
    cut = live.complete(guided_regex="[0-9]{5}END[0-9]{5}", stop="END")
    assert re.fullmatch("[0-9]{5}", cut["text"]) and cut["finish_reason"] == "stop" and cut["stop_reason"] == "END"
    answer = live.post(
        "/v1/completions", prompt=["a", "b"], n=3, logprobs=2, guided_regex="[a-z]{8}", max_tokens=20
    ).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) > 1 and all(re.fullmatch("[a-z]{8}", text) for text in texts)
    for choice in answer["choices"]:
        shown = "".join(choice["logprobs"]["tokens"])
        assert shown.startswith(choice["text"]) and all(p <= 0 for p in choice["logprobs"]["token_logprobs"])


def test_a_minimum_of_tokens_gives_way_where_the_text_must_end(live: Live) -> None:
    assert live.complete(guided_regex="ab?", min_tokens=10, temperature=0)["text"] in ("a", "ab")


def test_neighbours_draw_the_same_tokens_as_without_it(live: Live) -> None:
    """Free and matched answers in turn: the free ones are, token by token, those of an empty server."""

    def free(seed: int) -> Any:
        options = {"temperature": [0, 0.8, 1.2][seed % 3], "top_p": [1, 0.9][seed % 2], "logprobs": 0, "seed": seed}
        choice = live.complete(prompt=f"The {seed}", max_tokens=40, **options)
        return choice["logprobs"]["tokens"], choice["finish_reason"]

    alone = [free(seed) for seed in range(6)]
    with ThreadPoolExecutor(12) as pool:
        matched = [pool.submit(live.complete, seed=s, max_tokens=80, **by_schema(PERSON)) for s in range(6)]
        beside = list(pool.map(free, range(6)))
        assert all(m.result()["finish_reason"] in ("stop", "length") for m in matched)
    assert beside == alone


def test_the_official_client_parses_into_a_model(live: Live) -> None:
    class Step(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        kind: str = pydantic.Field(pattern="^(add|sub)$")
        value: int = pydantic.Field(ge=0, le=99)

    class Plan(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
        nothing: None

    messages: Any = [{"role": "user", "content": "plan"}]
    with live.client() as client:
        answer = client.chat.completions.parse(model="demo", messages=messages, response_format=Plan, max_tokens=300)
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Plan) and 1 <= len(parsed.steps) <= 2
        with client.chat.completions.stream(
            model="demo", messages=messages, response_format=Plan, max_tokens=300
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Plan)
    assert "".join(deltas) == final.choices[0].message.content


def test_responses_match_their_format_too(live: Live) -> None:
    form: Any = {"type": "json_schema", "name": "x", "schema": PERSON}
    with live.client() as client:
        answer = client.responses.create(model="demo", input="x", text={"format": form}, max_output_tokens=300)
        jsonschema.validate(json.loads(answer.output_text), PERSON)
        assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"
        with pytest.raises(openai.BadRequestError) as caught:
            wrong = {**form, "schema": UNSUPPORTED["not"]}
            client.responses.create(model="demo", input="x", text={"format": wrong}, max_output_tokens=9)
        assert caught.value.param == "text.format"


UNSUPPORTED: dict[str, Schema] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 1}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "nonsense": {"type": "string", "format": "nonsense"},
    "strin": {"type": "strin"},
    "oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "https://example.org/x": {"$ref": "https://example.org/x"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_schema_cannot_have_is_refused_by_name(live: Live, name: str) -> None:
    for schema in (UNSUPPORTED[name], {**UNSUPPORTED[name], "x-guidance": {"lenient": True, "coerce_one_of": True}}):
        answer = live.post("/v1/completions", prompt="x", **by_schema(schema))
        error = answer.json()["error"]
        assert answer.status_code == 400 and name in error["message"]
        assert (error["param"], error["code"]) == ("response_format.json_schema.schema", "invalid_grammar")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[1]"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_grammar": "no grammar"}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {"const": 1}, "whitespace_pattern": "("}}, "structured_outputs.json"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
     "response_format.json_schema.name"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_requests_name_the_field(live: Live, body: dict[str, Any], param: str) -> None:
    answer = live.post("/v1/completions", prompt="x", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def nested(levels: int) -> Schema:
    schema: Schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": by_schema(nested(300)),
    "wide": by_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}),
    "members": by_schema({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    "long": by_schema({"enum": [f"value {i}" for i in range(20_000)]}),
    "products": by_schema({"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"type": "string"}}} for c in "abcdef"]}
                                     for i in range(20)]}),
    "multiple": by_schema({"type": "integer", "multipleOf": 999_999_937}),
    "loop": by_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "intersection": by_schema({"allOf": [{"type": "string", "pattern": p} for p in (".*a.{20}$", ".*b.{25}$")]}),
    "alternatives": {"guided_regex": "|".join(f"w{i}x" for i in range(50_000))},
    "parentheses": {"guided_regex": "(" * 5000 + "a" + ")" * 5000},
    "nothing": {"guided_regex": "[^\\s\\S]"},
    "conjunction": {"guided_grammar": "start: T\nT: /.*a.{15}/ & /.*b.{16}/ & /.*c.{17}/ & ~/.*d.{18}/"},
    "blank lines": {"guided_grammar": "\n" * 120_000 + 'root ::= "a"'},
    "white space": {"structured_outputs": {"json": {"const": 1}, "whitespace_pattern": " ?" * 100_000}},
    "chain": {"guided_grammar": "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(9000))},
}  # fmt: skip
# Large, but fair: compiled lazily, and served in bounded time and memory.
HARMLESS: dict[str, dict[str, Any]] = {
    "lark": {
        "guided_grammar": "start: a0\n"
        + "\n".join(f"a{i}: " + " ".join([f"a{i + 1}"] * 10) for i in range(30))
        + '\na30: "x"'
    },
    "catastrophic": {"guided_regex": "(a+)+b"},
    "exponential": {"guided_regex": "(a|b)*a(a|b){500}"},
    "repetitions": {"guided_regex": "(a{1,1000}){1,1000}b"},
    "items": by_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "characters": by_schema({"type": "string", "minLength": 10**9}),
    "required": by_schema({"type": "object", "properties": {"p": {"$ref": "#"}}, "required": ["p"]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_cost_the_client_a_400(live: Live, name: str) -> None:
    answer = httpx.post(f"{live.url}/v1/completions", timeout=20,
                        json={"model": "demo", "prompt": "x", "max_tokens": 5, **HOSTILE[name]})  # fmt: skip
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.text) < 2000, "a message does not repeat what was sent"


def test_hostile_constraints_stop_nobody_else(live: Live) -> None:
    rss = resident_kib()
    with ThreadPoolExecutor(24) as pool:
        attacks = [pool.submit(live.post, "/v1/completions", prompt="x", max_tokens=30, **body)
                   for body in (*HOSTILE.values(), *HARMLESS.values())]  # fmt: skip
        fair = [pool.submit(live.complete, seed=i, max_tokens=300, **by_schema(PERSON)) for i in range(3)]
        for answer in fair:
            jsonschema.validate(json.loads(answer.result()["text"]), PERSON)
        statuses = [attack.result().status_code for attack in attacks]
    assert statuses[: len(HOSTILE)] == [400] * len(HOSTILE)
    assert set(statuses) <= {200, 400}, "the others may turn out too complex on the way"
    assert live.service.engine is not None and live.service.engine.stats().alive
    assert resident_kib() - rss < 400 * 1024


def resident_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_too_complex_halfway_ends_with_an_error_of_the_client(live: Live) -> None:
    """A text that needs more states than a matcher may have: an error event in a stream, after what was said."""
    from server.engine import structured

    old, structured.LIMITS = structured.LIMITS, {**structured.LIMITS, "max_lexer_states": 2000}
    try:
        body = {"max_tokens": 400, "temperature": 1.0, **by_schema({"type": "string", "minLength": 10_001})}
        whole = live.post("/v1/completions", prompt="x", **body)
        streamed = live.post("/v1/completions", prompt="x", stream=True, logprobs=0, **body)
    finally:
        structured.LIMITS = old
    error = whole.json()["error"]
    assert whole.status_code == 400
    assert (error["code"], error["param"]) == ("grammar_too_complex", "response_format.json_schema.schema")
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert json.loads(events[-1])["error"]["code"] == "grammar_too_complex"
    assert len(events) > 2, "what came before was sent"
    assert live.is_idle()


def test_clients_that_leave_take_their_matchers_along(live: Live) -> None:
    with live.client() as client:
        for seed in range(5):
            stream = client.completions.create(
                model="demo", prompt="x", max_tokens=300, stream=True, seed=seed,
                extra_body=by_schema({"type": "string", "minLength": 900}),
            )  # fmt: skip
            assert next(iter(stream)).choices[0].text.startswith('"')
            stream.close()
    assert live.is_idle()
    with pytest.raises(openai.BadRequestError), live.client() as client:
        client.completions.create(model="demo", prompt="x", extra_body={"guided_regex": "("})
