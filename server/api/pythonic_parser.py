"""Python's calls out of an answer's text, [f(x=1), g()], and their arguments as JSON.

Not Python's own parser: its warnings and limits are not for text of a model, and it cannot say that text is only cut.
A call counts where it names an offered function and all its arguments are literals by name; it is handed on whole, once
it is complete, so that what turns out to be none (a variable, an expression) can come out as the text it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from server.api.tool_parser import CallArguments, CallStart, Event, Nesting, ToolParser

_NAME = re.compile(r"[A-Za-z0-9_-]*")
_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<number>[+-]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)
    |(?P<name>[^\W0-9]\w*)
    |(?P<mark>\*\*|[][(){},:=])""",
    re.VERBOSE | re.DOTALL,
)
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPE = re.compile(
    r"""\\(?:([0-7]{1,3})
    |x([0-9a-fA-F]{2})
    |u([0-9a-fA-F]{4})
    |U(0010[0-9a-fA-F]{4}|000[0-9a-fA-F]{5})
    |(.))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BRACKETS = {"(": "[", ")": "]"}  # tuples are lists


class PythonicParser(ToolParser):
    """Calls in a list at the start of the text or behind the mark; behind the mark also without the list's brackets."""

    def __init__(self, opening: str, closing: str, bare: str, names: Collection[str]) -> None:
        super().__init__(opening, closing, bare, names)
        self._name = ""  # of the call that is being read
        self._close: int | None = None  # where its parenthesis closes

    def _begins_call(self) -> bool | None:
        run = _NAME.match(self._held)
        name = "" if run is None else run[0]
        behind = self._held[len(name) :].lstrip(" ")
        if not behind:
            known = name in self._names
            return None if known or any(offered.startswith(name) for offered in self._names) else False
        if behind[0] != "(" or name not in self._names:
            return False
        self._name, self._close = name, None
        self._object, self._num_scanned = Nesting(brackets=("([{", ")]}"), quotes="\"'"), len(name)
        return True

    def _call(self) -> bool:
        """Inside a call, or behind one of which what follows has to show that it stands for itself."""
        while self._close is None and self._num_scanned < len(self._held):
            if self._object.push(self._held[self._num_scanned]):
                self._close = self._num_scanned
            self._num_scanned += 1
        if self._close is None:
            return False
        behind = self._held[self._close + 1 :]
        rest = behind.lstrip()
        if not rest or (len(rest) < len(self._opening) and self._opening.startswith(rest)):
            return False
        between = behind[: len(behind) - len(rest)]
        marked = bool(self._opening) and rest.startswith(self._opening)
        self._take(stands=rest[0] in ",;]" or "\n" in between or marked)
        return True

    def end(self) -> list[Event]:
        """See `ToolParser`."""
        if self._step == self._call and self._close is not None:
            self._take(stands=True)
            while self._step():
                pass
        return super().end()

    def _take(self, *, stands: bool) -> None:
        """Hand on the call that is complete, or say it as text."""
        assert self._close is not None, "the call is complete"
        whole, self._held = self._held[: self._close + 1], self._held[self._close + 1 :]
        arguments = arguments_json(whole[whole.index("(") + 1 : -1]) if stands else None
        self._step = self._between
        if arguments is None:
            self._be_text(self._skipped + whole)
            return
        self.num_calls += 1
        self._events += [CallStart(self._name), CallArguments(arguments)]
        self._skipped = ""


def arguments_json(text: str) -> str | None:
    """What stands between a call's parentheses as a JSON object; None where it is anything but literals by name.

    Numbers stay as they are written where JSON writes them so. Of a name that comes twice the last counts, as in JSON.
    """
    tokens = _tokens(text)
    if tokens is None:
        return None
    members: list[str] = []
    for group in _split(tokens):
        value = _value(group[2:] if group[0][0] == "name" else group[1:])
        if group[0][0] == "name" and group[1:2] == [("mark", "=")]:
            members.append(f"{json.dumps(group[0][1], ensure_ascii=False)}: {value}")
        elif group[0] == ("mark", "**") and value[:1] == "{":
            members += [value[1:-1]] if value != "{}" else []
        else:
            return None
    whole = "{" + ", ".join(members) + "}"
    try:
        return whole if isinstance(json.loads(whole), dict) else None
    except (ValueError, RecursionError):
        return None


def _tokens(text: str) -> list[tuple[str, str]] | None:
    """Kind and text of each token, strings that touch made one; None where there is something else."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            return None
        kind, at = match.lastgroup, match.end()
        if kind == "string" and found and found[-1][0] == "string":
            found[-1] = ("string", found[-1][1] + _unescaped(match[0][1:-1]))
        elif kind != "space":
            found.append((kind, _unescaped(match[0][1:-1]) if kind == "string" else match[0]))
    return found


def _split(tokens: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The tokens between the outermost commas; a comma may stand at the end."""
    groups: list[list[tuple[str, str]]] = [[]]
    depth = 0
    for kind, text in tokens:
        depth += (text in ("(", "[", "{")) - (text in (")", "]", "}")) if kind == "mark" else 0
        if kind == "mark" and text == "," and not depth:
            groups.append([])
        else:
            groups[-1].append((kind, text))
    if not groups[-1]:
        groups.pop()
    return [group or [("mark", ",")] for group in groups]


def _value(tokens: list[tuple[str, str]]) -> str:
    """A literal as JSON, or something that is none."""
    written = ""
    for i, (kind, text) in enumerate(tokens):
        behind = tokens[i + 1] if i + 1 < len(tokens) else ("mark", "")
        if kind != "mark":
            written += _scalar(kind, text) + (" " if behind[0] != "mark" else "")
        elif text in ",:":
            closes = text == "," and behind[1] in (")", "]", "}") and behind[0] == "mark" and tokens[i - 1 : i]
            written += "" if closes and tokens[i - 1][1] not in ("(", "[", "{", ",") else text + " "
        else:
            written += _BRACKETS.get(text, text)
    return written


def _scalar(kind: str, text: str) -> str:
    """A string, number or constant as JSON; "?" for what is none."""
    if kind == "string":
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of characters, which JSON can only spell
            return json.dumps(text)
        return json.dumps(text, ensure_ascii=False)
    if kind == "name":
        return _CONSTANTS.get(text, "?")
    if _JSON_NUMBER.fullmatch(text):
        return text
    try:
        return json.dumps(float(text) if re.search("[.eE]", text) else int(text), allow_nan=False)
    except ValueError:  # too large
        return "?"


def _unescaped(body: str) -> str:
    return _ESCAPE.sub(_character, body)


def _character(escape: re.Match[str]) -> str:
    octal, short, middle, long, other = escape.groups()
    if octal is not None:
        return chr(int(octal, 8))
    code = short or middle or long
    if code is not None:
        return chr(int(code, 16))
    return _ESCAPED.get(other, other if other in "\\'\"" else f"\\{other}")
