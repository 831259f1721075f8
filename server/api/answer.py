"""One sequence on its way from engine events to text deltas. No HTTP, no JSON, no metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from server.core import FinishReason, SamplingParams, StepOutput, TokenLogprobs
from server.detokenizer import Detokenizer, TextStyle
from server.engine.engine import Generation
from server.errors import EngineError
from server.tokenizer import Tokenizer

Finish = Literal["stop", "length"]
PromptScores = list[tuple[int, TokenLogprobs | None]]  # of each token; None for the first, which nothing precedes


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with its parameters. `text` is what echo shows."""

    ids: list[int]
    params: SamplingParams
    text: str = ""
    echo_logprobs: int | None = None  # how many of the best at each place stand beside the text; None: no scores


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated request: prompts x n answers, answer i of prompt p having index p * n + i."""

    response_id: str
    engine_id: str  # unique, as a client's own id may not be
    prompts: Sequence[Prompt]
    n: int
    style: TextStyle
    continuing: bool  # text is appended to the prompt's (completions), not a text of its own (chat)
    echo: bool = False
    with_token_ids: bool = False  # deltas carry the ids of their tokens
    prompt_logprobs: int | None = None  # the first delta of an answer carries its prompt's scores, with the k best
    deadline_s: float | None = None  # monotonic
    priority: int = 0
    cache_salt: str | None = None

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of an answer."""
        return self.prompts[index // self.n]


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token with its log-probabilities (None for a prompt's first) and where it starts in the text."""

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int  # characters


@dataclass(slots=True)
class Delta:
    """What an answer gained. The last one has `finish_reason`; `stop_reason` is the stop string or token id hit."""

    index: int
    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # where the plan asks for them
    prompt_scores: PromptScores | None = None  # likewise
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None

    def extend(self, other: Delta) -> None:
        """Append the next delta of the same answer."""
        self.text += other.text
        self.entries += other.entries
        self.token_ids += other.token_ids
        self.prompt_scores = self.prompt_scores or other.prompt_scores
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason

    def split(self) -> list[Delta]:
        """The chunks of a stream: text never comes with a finish reason."""
        if self.finish_reason is None:
            return [self]
        finish = Delta(self.index, finish_reason=self.finish_reason, stop_reason=self.stop_reason)
        if not self.text:
            finish.entries, finish.token_ids = self.entries, self.token_ids
            return [finish]
        return [Delta(self.index, self.text, self.entries, self.token_ids), finish]


class Answer:
    """One sequence on its way to text; `ended` is set with the last delta."""

    def __init__(self, index: int, plan: Plan, generation: Generation, tokenizer: Tokenizer) -> None:
        self.prompt_index = index // plan.n
        self.prompt = prompt = plan.prompt_of(index)
        self.generation = generation
        self.num_tokens = 0
        self.last_token_s: float | None = None
        self.ended: Finish | None = None
        self._index = index
        self._tokenizer = tokenizer
        self._echo = prompt.text if plan.echo else ""
        self._echo_pending = plan.echo
        self._detokenizer = Detokenizer(
            tokenizer,
            plan.style,
            continuing=plan.continuing and not all(map(tokenizer.is_special, prompt.ids)),
            min_tokens=prompt.params.min_tokens,
        )
        self._style = plan.style
        self._with_token_ids = plan.with_token_ids
        self._prompt_logprobs = plan.prompt_logprobs
        self._entries: list[TokenEntry] = []
        self._token_ids: list[int] = []

    def feed(self, output: StepOutput) -> Delta:
        """The delta of one event; entries wait for the text they belong to."""
        delta = Delta(self._index)
        if self._echo_pending:
            self._echo_pending = False
            delta.text = self._echo
            self._entries += self._prompt_entries()
        if output.token_id is not None:
            offset = len(self._echo) + self._detokenizer.num_chars
            if output.logprobs is not None:
                self._entries.append(TokenEntry(output.token_id, output.logprobs, offset))
            if self._with_token_ids:
                self._token_ids.append(output.token_id)
            visible = self._style.include_stop or output.finish_reason is not FinishReason.STOP
            delta.text += self._detokenizer.push(output.token_id, visible=visible)
        if output.finish_reason is not None and self._detokenizer.stopped is None:
            delta.text += self._detokenizer.flush()
        self._finish(delta, output)
        if delta.text or delta.finish_reason is not None:
            if self._prompt_logprobs is not None:
                delta.prompt_scores = self._scored_prompt(self._prompt_logprobs)
                self._prompt_logprobs = None
            delta.entries, self._entries = self._entries, []
            delta.token_ids, self._token_ids = self._token_ids, []
        return delta

    def _scored_prompt(self, k: int) -> PromptScores:
        """The prompt's tokens, each but the first with its score and the `k` best."""
        scores = [replace(score, top=score.top[:k]) for score in self.generation.sequence.prompt_logprobs]
        return list(zip(self.prompt.ids, [None, *scores], strict=True))

    def _finish(self, delta: Delta, output: StepOutput) -> None:
        if self._detokenizer.stopped is not None:
            delta.finish_reason, delta.stop_reason = "stop", self._detokenizer.stopped
        elif output.finish_reason is FinishReason.STOP:
            is_eos = output.token_id in self.prompt.params.eos_token_ids
            delta.finish_reason, delta.stop_reason = "stop", None if is_eos else output.token_id
        elif output.finish_reason is FinishReason.LENGTH:
            delta.finish_reason = "length"
        elif output.finish_reason is not None:
            raise EngineError(f"the engine ended the answer early: {output.error or output.finish_reason.value}")
        self.ended = delta.finish_reason

    def _prompt_entries(self) -> list[TokenEntry]:
        if self.prompt.echo_logprobs is None:
            return []
        detokenizer = Detokenizer(self._tokenizer, replace(self._style, stop=()))
        entries = []
        for token_id, logprobs in self._scored_prompt(self.prompt.echo_logprobs):
            entries.append(TokenEntry(token_id, logprobs, detokenizer.num_chars))
            detokenizer.push(token_id)
        return entries
