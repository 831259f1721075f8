"""Token log-probabilities in OpenAI's two shapes, parallel lists for completions and objects for chat, and vLLM's of
prompts.

There is one entry for every token that `usage` counts, the end token included, as evaluation harnesses expect.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.api.answer import PromptScores, TokenEntry
from server.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, PromptLogprob, TopLogprob
from server.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def completion_logprobs(
    entries: Sequence[TokenEntry], tokenizer: Tokenizer, *, as_ids: bool = False
) -> CompletionLogprobs:
    """Parallel lists; the top of a position always has the token that stands there."""

    def label(token_id: int) -> str:
        return f"token_id:{token_id}" if as_ids else token_label(token_id, tokenizer)

    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            tops.append(None)
            continue
        top = {label(token_id): _finite(value) for token_id, value in entry.logprobs.top}
        top.setdefault(label(entry.token_id), _finite(entry.logprobs.logprob))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[label(entry.token_id) for entry in entries],
        token_logprobs=[None if e.logprobs is None else _finite(e.logprobs.logprob) for e in entries],
        top_logprobs=tops,
        text_offset=[entry.offset for entry in entries],
    )


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, *, as_ids: bool = False) -> ChatLogprobs:
    """One object per token, with its bytes, so that split characters can be put together."""

    def candidate(token_id: int, value: float) -> TopLogprob:
        data = tokenizer.token_bytes(token_id)
        token = f"token_id:{token_id}" if as_ids else data.decode("utf-8", "replace")
        return TopLogprob(token=token, logprob=_finite(value), bytes=list(data))

    content = [
        ChatTokenLogprob(
            **candidate(entry.token_id, entry.logprobs.logprob).model_dump(),
            top_logprobs=[candidate(token_id, value) for token_id, value in entry.logprobs.top],
        )
        for entry in entries
        if entry.logprobs is not None
    ]
    return ChatLogprobs(content=content, refusal=None)


def prompt_logprobs(scores: PromptScores, tokenizer: Tokenizer) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's shape: for each token of the prompt, by id, itself and the best ones. None for the first."""
    places: list[dict[str, PromptLogprob] | None] = []
    for token_id, logprobs in scores:
        if logprobs is None:
            places.append(None)
            continue
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(logprobs.top, start=1)]
        found = {i: (value, rank) for i, value, rank in [(token_id, logprobs.logprob, logprobs.rank), *ranked]}
        places.append(
            {
                str(i): PromptLogprob(logprob=_finite(value), rank=rank, decoded_token=token_label(i, tokenizer))
                for i, (value, rank) in found.items()
            }
        )
    return places


def token_label(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text, or `bytes:\\xe2\\x82` where it is a part of a character: distinct tokens stay distinct keys."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(value: float) -> float:
    return max(value, LOWEST)
