"""Token ids to text, one at a time: ids -> bytes -> complete characters -> text up to a stop string.

Not the tokenizer (that encodes and renders chats) and not the engine's stop tokens. Every step keeps O(1) state, so a
token costs the same at position 10 and at 100,000: bytes go through an incremental UTF-8 decoder, stop strings through
one Knuth-Morris-Pratt automaton each. Broken UTF-8 becomes U+FFFD as the Unicode standard recommends (one for each
maximal broken part), and only once it is certain that no later token can repair it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTable(Protocol):
    """What the detokenizer needs to know of a vocabulary. `server.tokenizer.Tokenizer` has it."""

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes a token stands for; `first` where nothing stands before it."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which text does not show."""
        ...


@dataclass(frozen=True, slots=True)
class TextStyle:
    """What of a sequence is text."""

    stop: Sequence[str] = ()
    include_stop: bool = False  # the stop string, or stop token, that ended it
    skip_special: bool = True  # control tokens
    spaces_between_special: bool = True  # where they are shown: the space that some vocabularies put between two


PLAIN = TextStyle()


class TokenBytes:
    """The bytes of every token of a `transformers` tokenizer, found on first use and remembered.

    Byte-level vocabularies (GPT-2, Llama 3) spell bytes as printable characters; SentencePiece-style ones (Llama 2)
    have a token `<0xXX>` per byte; everything else is text, read off as what a token adds behind an anchor token.
    Keeps the vocabulary and the decoder, not the tokenizer, whose backend another thread may be switching.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} has no fast backend; the model's folder needs tokenizer.json")
        self._pieces: dict[int, str] = {token_id: piece for piece, token_id in tokenizer.get_vocab().items()}
        self._decoder = backend.decoder
        self._bytes_of_char = _byte_level_alphabet() if "ByteLevel" in _decoder_kinds(backend.decoder) else None
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor = [self._pieces[token_id] for token_id in anchor]
        self._anchor_len = len(self._decode(self._anchor))
        self._inner: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}

    def of(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes of one token; b"" for an id that the vocabulary does not have."""
        cache = self._first if first else self._inner
        known = cache.get(token_id)
        if known is None:
            known = cache[token_id] = self._find(token_id, first)
        return known

    def _find(self, token_id: int, first: bool) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            return b""
        if self._bytes_of_char is not None:
            try:
                return bytes(self._bytes_of_char[char] for char in piece)
            except KeyError:  # an added token, spelled as itself
                return piece.encode()
        byte = BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return b"" if first and not self._decode([piece]) else bytes.fromhex(byte[1])
        if first:
            return self._decode([piece]).encode()
        return self._decode([*self._anchor, piece])[self._anchor_len :].encode()

    def _decode(self, pieces: list[str]) -> str:
        return " ".join(pieces) if self._decoder is None else str(self._decoder.decode(pieces))


class StopMatcher:
    """Passes text on, holding back what may yet become a stop string. The stop that completes first wins.

    Which characters arrive together makes no difference. Of stops that complete at the same character the longest
    wins. Cost: one automaton step per character and stop, amortised.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string that is found is part of the text."""
        self._include = include
        self._stops = [(stop, _failure_function(stop)) for stop in stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now certain. After a hit, nothing more comes out."""
        if not self._stops or self.hit is not None:
            return "" if self.hit is not None else text
        text = self._held + text
        for position in range(len(self._held), len(text)):
            self._advance(text[position])
            if self.hit is not None:
                self._held = ""
                return text[: position + 1 - (0 if self._include else len(self.hit))]
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return text[:certain]

    def release(self) -> str:
        """Give up what was held back and forget it: the end of the text, or text in which stops do not count."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> None:
        for i, (stop, failure) in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            self._states[i] = state = state + (stop[state] == char)
            if state == len(stop) and (self.hit is None or len(stop) > len(self.hit)):
                self.hit = stop


class Detokenizer:
    """The text of one sequence, as it grows.

    The joined results of `push` and `flush` are the decoded text of all pushed tokens, cut where the first stop
    string begins (or ends, as `style` has it). `continuing` says that text stands before the first token, so that a
    leading space counts. Stop strings are not looked for in the text of the first `min_tokens` tokens.
    """

    def __init__(
        self, table: TokenTable, style: TextStyle = PLAIN, *, continuing: bool = False, min_tokens: int = 0
    ) -> None:
        self._table = table
        self._style = style
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(style.stop, include=style.include_stop)
        self._after_special = False
        self._at_start = not continuing
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.num_chars = 0  # characters decoded so far, held back ones included: the offset of the next token

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, if any; the text ends there."""
        return self._matcher.hit

    def push(self, token_id: int, *, visible: bool = True) -> str:
        """Add a token, return the text that became certain.

        A token that is not `visible` (a stop token) counts but has no text; so do special ones unless shown.
        """
        self._num_tokens += 1
        special = self._table.is_special(token_id)
        if not visible or (special and self._style.skip_special):
            return ""
        bare = special and self._after_special and not self._style.spaces_between_special
        data = self._table.token_bytes(token_id, first=self._at_start or bare)
        self._at_start, self._after_special = False, special
        return self._emit(self._utf8.decode(data))

    def flush(self) -> str:
        """The end: what was held back, and U+FFFD for an unfinished character."""
        return self._emit(self._utf8.decode(b"", final=True)) + self._matcher.release()

    def _emit(self, text: str) -> str:
        self.num_chars += len(text)
        if self._num_tokens <= self._min_tokens and self._matcher.hit is None:
            return self._matcher.release() + text
        return self._matcher.feed(text)


def _failure_function(pattern: str) -> list[int]:
    """For each prefix of `pattern`, its longest proper prefix that is also its suffix (Knuth, Morris, Pratt 1977)."""
    failure = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = failure[length - 1]
        length += pattern[i] == pattern[length]
        failure[i] = length
    return failure


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _decoder_kinds(decoder: Any) -> set[str]:
    """The type names of a `tokenizers` decoder and of those inside it."""
    if decoder is None:
        return set()

    def names(state: Any) -> set[str]:
        nested = [names(inner) for inner in state.get("decoders", ())]
        return {str(state["type"])}.union(*nested)

    return names(json.loads(decoder.__getstate__()))
