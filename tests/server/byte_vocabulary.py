"""A vocabulary of single bytes and a few longer tokens, for tests of matching."""

from __future__ import annotations


class ByteVocabulary:
    """Ids 0 and 1 are control tokens (1 ends a text), then come 256 bytes, then `words`."""

    EOS = 1

    def __init__(self, *words: str) -> None:
        self.tokens = [b"<s>", b"</s>", *(bytes([i]) for i in range(256)), *(word.encode() for word in words)]

    def __len__(self) -> int:
        return len(self.tokens)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id < 2

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The longest token that fits, again and again."""
        data, ids = text.encode(), []
        while data:
            size = max(len(t) for t in self.tokens[2:] if data.startswith(t))
            ids.append(self.tokens.index(data[:size], 2))
            data = data[size:]
        return ids

    def text(self, ids: list[int]) -> str:
        return b"".join(self.tokens[i] for i in ids if i > 1).decode()
