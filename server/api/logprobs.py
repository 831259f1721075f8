"""Token log-probabilities in OpenAI's two shapes: parallel lists for completions, objects for chat.

There is one entry for every token that `usage` counts, the end token included, as evaluation harnesses expect.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.api.answer import TokenEntry
from server.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from server.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> CompletionLogprobs:
    """Parallel lists; the top of a position always has the token that stands there."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            tops.append(None)
            continue
        top = {token_label(token_id, tokenizer): _finite(value) for token_id, value in entry.logprobs.top}
        top.setdefault(token_label(entry.token_id, tokenizer), _finite(entry.logprobs.logprob))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[token_label(entry.token_id, tokenizer) for entry in entries],
        token_logprobs=[None if e.logprobs is None else _finite(e.logprobs.logprob) for e in entries],
        top_logprobs=tops,
        text_offset=[entry.offset for entry in entries],
    )


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> ChatLogprobs:
    """One object per token, with its bytes, so that split characters can be put together."""
    content = [
        ChatTokenLogprob(
            **_candidate(entry.token_id, entry.logprobs.logprob, tokenizer).model_dump(),
            top_logprobs=[_candidate(token_id, value, tokenizer) for token_id, value in entry.logprobs.top],
        )
        for entry in entries
        if entry.logprobs is not None
    ]
    return ChatLogprobs(content=content, refusal=None)


def token_label(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text, or `bytes:\\xe2\\x82` where it is a part of a character: distinct tokens stay distinct keys."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _candidate(token_id: int, value: float, tokenizer: Tokenizer) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=_finite(value), bytes=list(data))


def _finite(value: float) -> float:
    return max(value, LOWEST)
