"""What a stream of server-sent events says of one answer: its text, when each piece came, its usage, why it ended.

For every client here, whatever it reads with. Completions and chat, in the words of vLLM, llama.cpp, transformers and
our server; a field that a server does not send stays None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field


class ErrorEvent(RuntimeError):
    """The server sent an error in the middle of a stream; the message is its own."""


@dataclass(slots=True)
class Answer:
    """One stream. Times in seconds."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between chunks of text
    chunks: int = 0
    prompt_tokens: int | None = None  # as the server counted them; None: it did not say
    completion_tokens: int | None = None
    finish_reason: str | None = None
    last_text: str = ""  # of the last event that carried text


def payload_of(line: bytes) -> bytes | None:
    """What a line of the stream carries; None of other lines and of the closing [DONE]."""
    if not line.startswith(b"data:"):
        return None
    payload = line[5:].strip()
    return None if payload == b"[DONE]" else payload


def read_event(data: bytes, answer: Answer) -> bool:
    """Note what one event says. True if it carried text. Raises ErrorEvent if it is an error."""
    event = json.loads(data)
    if event.get("error"):
        raise ErrorEvent(f"the server sent an error: {message_of(data)}")
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.completion_tokens = usage.get("completion_tokens")
    choices = event.get("choices")
    if not choices:
        return False
    answer.finish_reason = choices[0].get("finish_reason") or answer.finish_reason
    delta = choices[0].get("delta") or {}
    text = choices[0].get("text") or delta.get("content") or delta.get("reasoning_content")
    if not text:
        return False
    answer.last_text = text
    answer.chunks += 1
    return True


def take_event(data: bytes, answer: Answer, last_s: float, now_s: float) -> float:
    """`read_event` of an event that came at `now_s`; `last_s` is when the text before it came, or the request was sent.

    Returns what is `last_s` of the next one.
    """
    if not read_event(data, answer):
        return last_s
    if answer.chunks == 1:
        answer.ttft_s = now_s - last_s
    else:
        answer.gaps_s.append(now_s - last_s)
    return now_s


def message_of(body: bytes) -> str:
    """The message in an error body of OpenAI's form; the body itself where it is none."""
    text = body.decode("utf-8", errors="replace")
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text[:500]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
