"""What a client may write about the text of an answer, and how llguidance takes it; what is too large is refused here.

JSON between values: at most one space, or one line break with its indentation. Without a bound a model that
likes white space could write nothing else until its tokens are used up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from server.errors import BadRequest

MAX_CHARS = 1 << 17  # a schema of so many compiles in 0.3 s (Zen 3)
MAX_GBNF_CHARS = 1 << 14  # translated in Python, at worst in a time that grows with the square: 0.5 s
MAX_DEPTH = 100
MAX_MEMBERS = 1_000  # of one object; compiling optional properties grows with the square: 1,000 take 0.1 s (Zen 3)
WHITE_SPACE = r"( |\n[ \t]{0,40})"

_LARK_LINE = re.compile(r"[ \t]*start[ \t]*:")

Kind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a request asks for."""

    kind: Kind
    text: str  # schemas and lists of choices as JSON; grammars in Lark's or llama.cpp's (GBNF) notation
    param: str  # the field of the request
    white_space: str = WHITE_SPACE  # regular expression of what may stand between parts of JSON


def to_llguidance(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises BadRequest for what is too large or no such notation.

    Text that is the only one possible is not forced, token by token, as the tokenizer would cut it: the model chooses
    among the ways to spell it. Forcing would work out the whole text for each token, and (a{1000}){1000} is one text.
    """
    import llguidance

    size = max(len(constraint.text), len(constraint.white_space))
    if size > MAX_CHARS:
        raise _refusal(constraint, f"it has {size} characters, the limit is {MAX_CHARS}")
    if constraint.kind == "json_schema":
        rule = f"start: {schema_rule(constraint)}"
    elif constraint.kind == "regex":
        rule = f"start: /{llguidance.regex_to_lark(constraint.text)}/"
    elif constraint.kind == "choice":
        rule = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.text))
    else:
        rule = _to_lark(constraint)
    return str(llguidance.LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{rule}'))


def schema_rule(constraint: Constraint) -> str:
    """A JSON schema as the right side of a rule of Lark's. Raises BadRequest for one that is too large."""
    import llguidance

    schema = json.loads(constraint.text)
    _check_size(constraint, schema)
    options: Any = {
        "whitespace_flexible": bool(constraint.white_space),
        "whitespace_pattern": constraint.white_space or None,
        "lenient": False,
        "coerce_one_of": False,
    }
    made = json.loads(llguidance.LLMatcher.grammar_from_json_schema(constraint.text, overrides=options))
    return f"%json {json.dumps(made['grammars'][0]['json_schema'])}"


def _to_lark(constraint: Constraint) -> str:
    """A grammar in Lark's notation. GBNF is what has no line that begins Lark's `start` rule."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    text = constraint.text
    if "%llguidance" in text:
        raise _refusal(constraint, "the directive %llguidance is not served")
    if any(map(_LARK_LINE.match, text.splitlines())):
        return text
    if len(text) > MAX_GBNF_CHARS:
        raise _refusal(
            constraint, f"in GBNF a grammar may have {MAX_GBNF_CHARS} characters; this has no line that begins start:"
        )
    try:
        return gbnf_to_lark(text).replace("%llguidance {}", "", 1)
    except Exception as error:  # what it raises is of no class of its own
        raise _refusal(constraint, " ".join(str(error).split())[:500]) from error


def _check_size(constraint: Constraint, schema: Any) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, dict) and len(value) > MAX_MEMBERS:
                raise _refusal(constraint, f"an object in it has {len(value)} members, the limit is {MAX_MEMBERS}")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise _refusal(constraint, f"it is nested deeper than {MAX_DEPTH} levels")


def _refusal(constraint: Constraint, reason: str) -> BadRequest:
    kind = constraint.kind.replace("_", " ")
    return BadRequest(f"this {kind} cannot be used: {reason}", param=constraint.param, code="invalid_grammar")
