"""Calls of functions out of an answer's text as it grows: what is content, which call begins, what its arguments gain.

Text in, events out; no HTTP, no ids. A call counts where it is an object with the name of an offered tool and its
arguments. What looked like one and is none comes out as the text it is. Arguments are handed on while they grow as soon
as the name stands before them, which is how models write them; else the call comes out whole when it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')
_ARGUMENTS = ("arguments", "parameters")
_BETWEEN = " \t\r\n,;[]"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is part of no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The last call's arguments, JSON as the model wrote it, gained a piece."""

    text: str


Event = Content | CallStart | CallArguments


class Nesting:
    """Brackets and strings as they come. `depth` is 0 before them and, once `push` has returned True, behind them."""

    def __init__(self, *, brackets: tuple[str, str] = ("{[", "}]"), quotes: str = '"') -> None:
        self.depth = 0
        self._opening, self._closing = brackets
        self._quotes = quotes
        self._quote = ""  # of the string that is being read
        self._escaped = False

    def push(self, char: str) -> bool:
        """Take a character in; True where it closes the outermost bracket."""
        if self._quote:
            self._quote = "" if char == self._quote and not self._escaped else self._quote
            self._escaped = char == "\\" and not self._escaped
        elif char in self._quotes:
            self._quote = char
        elif char in self._opening:
            self.depth += 1
        elif char in self._closing:
            self.depth -= 1
            return self.depth == 0
        return False


class ToolParser:
    """One answer. `feed` pieces of its text, then `end`. Which characters come together makes no difference.

    `opening` and `closing` are the marks, "" where there are none; `bare` characters begin calls at the start of the
    text without a mark; `names` are those that may be called. Calls written otherwise than as objects are read by
    subclasses.
    """

    def __init__(self, opening: str, closing: str, bare: str, names: Collection[str]) -> None:
        self.num_calls = 0
        self._opening = opening.strip()
        self._marks = tuple(mark for mark in (self._opening, closing.strip()) if mark)
        self._bare = bare
        self._names = names
        self._events: list[Event] = []
        self._step = self._start
        self._held = ""  # read, and not yet known what it is
        self._skipped = ""  # marks and punctuation before what is held, content again if no call follows
        self._num_scanned = 0  # characters held that `_object` has seen
        self._object = Nesting()
        self._value: Nesting | None = None  # the arguments, while they are handed on

    def feed(self, text: str) -> list[Event]:
        """The events that became certain."""
        self._held += text
        while self._step():
            pass
        events, self._events = self._events, []
        return events

    def end(self) -> list[Event]:
        """The text has ended: what was held back. A call that was cut off stays one, if its name was known."""
        if self._step == self._start or self._step == self._text:
            self._say(self._held)
        elif self._value is None and (self._step == self._call or not self.num_calls):
            self._say(self._skipped + self._held)
        elif self._value is None and not any(mark.startswith(self._held) for mark in self._marks):
            self._say(self._held)
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _start(self) -> bool:
        """Nothing but white space was read. As the other steps, returns whether to go on with the next."""
        begun = self._held.lstrip()
        if not begun or (len(begun) < len(self._opening) and self._opening.startswith(begun)):
            return False
        bare = begun[0] in self._bare and not (self._opening and begun.startswith(self._opening))
        self._step = self._between if bare else self._text
        return True

    def _text(self) -> bool:
        """Content, of which the end may be the beginning of a mark. White space before a mark is dropped."""
        at = self._held.find(self._opening) if self._opening else -1
        if at >= 0:
            self._say(self._held[:at].rstrip())
            self._skipped, self._held = self._opening, self._held[at + len(self._opening) :]
            self._step = self._between
            return True
        lengths = range(min(len(self._opening) - 1, len(self._held)), 0, -1)
        kept = next((n for n in lengths if self._opening.startswith(self._held[-n:])), 0)
        certain = self._held[: len(self._held) - kept].rstrip()
        self._say(certain)
        self._held = self._held[len(certain) :]
        return False

    def _between(self) -> bool:
        """Before a call, or behind one: marks and punctuation."""
        mark = next((mark for mark in self._marks if self._held.startswith(mark)), None)
        if mark is None and (not self._held or any(mark.startswith(self._held) for mark in self._marks)):
            return False
        if mark is not None or self._held[0] in _BETWEEN:
            size = len(mark or " ")
            self._skipped, self._held = self._skipped + self._held[:size], self._held[size:]
            return True
        begins = self._begins_call()
        if begins:
            self._step = self._call
        elif begins is not None:
            self._be_text("" if self.num_calls else self._skipped)
        return begins is not None

    def _begins_call(self) -> bool | None:
        """Whether what is held begins what may be a call; None where that takes more text."""
        if self._held[0] != "{":
            return False
        self._object, self._num_scanned = Nesting(), 0
        return True

    def _call(self) -> bool:
        """Inside an object that may be a call."""
        for at in range(self._num_scanned, len(self._held)):
            char = self._held[at]
            complete = self._object.push(char)
            if self._value is not None and self._value.depth:
                self._pass_on(char)
            elif self._value is None and char == "{" and self._object.depth == 2:
                self._begin(self._held[: at + 1])
            if complete:
                whole, self._held = self._held[: at + 1], self._held[at + 1 :]
                self._end_call(whole)
                return True
        self._num_scanned = len(self._held)
        return False

    def _begin(self, text: str) -> None:
        """Hand on the arguments, if the brace at the end of `text` begins those of a call by an offered name."""
        head = _HEAD.fullmatch(text)
        name = None if head is None else _loads(head[1])
        if isinstance(name, str) and name in self._names:
            self._begin_arguments(name)

    def _begin_arguments(self, name: str) -> None:
        self.num_calls += 1
        self._events.append(CallStart(name))
        self._value = Nesting()
        self._pass_on("{")

    def _pass_on(self, char: str) -> None:
        assert self._value is not None, "arguments have begun"
        self._value.push(char)
        last = self._events[-1] if self._events else None
        if isinstance(last, CallArguments):
            self._events[-1] = CallArguments(last.text + char)
        else:
            self._events.append(CallArguments(char))

    def _end_call(self, whole: str) -> None:
        self._step = self._between
        if self._value is None and not self._read_whole(whole):
            self._be_text(self._skipped + whole)
        self._skipped, self._value = "", None

    def _read_whole(self, whole: str) -> bool:
        """Whether it is a call all the same: its parts in another order, or its arguments as a string."""
        call = _loads(whole)
        if not isinstance(call, dict):
            return False
        arguments = next((call[key] for key in _ARGUMENTS if key in call), None)
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        name = call.get("name")
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return False
        self.num_calls += 1
        self._events += [CallStart(name), CallArguments(json.dumps(arguments, ensure_ascii=False))]
        return True

    def _be_text(self, text: str) -> None:
        """What was taken for a call or the way to one is content, and the rest is looked at as such."""
        self._say(text)
        self._skipped = ""
        self._step = self._text


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
