"""The types that live in the engine's loop. Standard library only: no torch, no HTTP.

A `Sequence` is the one mutable thing: the scheduler moves it, the loop appends to it, nobody else writes. What is made
once per sequence and step is not frozen, though nobody writes to it: frozen, a dataclass of five fields takes four
times as long to make (1.2 against 0.3 us, Zen 3, Python 3.11), which 256 running sequences feel.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a sequence ended. OpenAI knows `stop` and `length`; the others never reach a finished answer."""

    STOP = "stop"  # an end-of-sequence or stop token; stop strings are found later, by the detokenizer
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # the client left, or a stop string was found
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the engine honours for one sequence. Validated at the edge; the engine trusts it."""

    max_tokens: int  # new tokens at most; 0 scores the prompt and stops
    min_tokens: int = 0  # end-of-sequence and stop tokens are forbidden before this many
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int = 0  # always set: the edge draws one where the client gave none
    repetition_penalty: float = 1.0  # over prompt and output (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()  # the model's own; empty under ignore_eos
    allowed_token_ids: tuple[int, ...] = ()  # nothing else may be drawn; empty = all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences whose last token may not follow the others
    logprobs: int | None = None  # None = none; k = the sampled token and the k best
    logprob_token_ids: tuple[int, ...] = ()  # score these in place of the k best
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    pools: bool = False  # sum the states of all prompt tokens, for an embedding; with max_tokens 0

    @property
    def needs_host(self) -> bool:
        """Whether a step needs what the one before brought to the host: tokens to penalise, or how far scores go."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        looks_back = penalised or any(len(word) > 1 for word in self.bad_words)
        return looks_back or self.reads_prompt

    @property
    def reads_prompt(self) -> bool:
        """Whether something of every prompt token is asked for: all have to be run, found in the cache or not."""
        return self.prompt_logprobs is not None or self.pools


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's raw logits) of one position."""

    logprob: float  # of the token that stands there
    rank: int  # 1 = the most likely
    top: tuple[tuple[int, float], ...]  # the k best, best first; or those of `logprob_token_ids`, in their order


@dataclass(slots=True)
class StateSum:
    """The model's last states, after the last norm, summed over tokens."""

    total: list[float]  # one number per dimension; empty before the first token
    num_tokens: int

    def add(self, states: SequenceOf[float], num_tokens: int) -> None:
        """Add the sum over the next tokens."""
        self.total = [a + b for a, b in zip(self.total, states, strict=True)] if self.total else list(states)
        self.num_tokens += num_tokens


@dataclass(slots=True)
class Timings:
    """Monotonic seconds; None until it happened."""

    arrived_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and what was generated after it."""

    request_id: str
    token_ids: list[int]  # the last one may be below 0 while a step runs, see server.scheduler.flight
    num_prompt_tokens: int
    params: SamplingParams
    timings: Timings
    deadline_s: float | None = None  # monotonic seconds
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache at first admission
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    states: StateSum = field(default_factory=lambda: StateSum([], 0))  # of the prompt, where it is to be pooled
    max_len: int = 0  # tokens with which it ends at the latest, and the tokens that end it sooner: the scheduler
    end_ids: frozenset[int] = frozenset()  # sets both once, since it looks at them with every token
    priority: int = 0  # lower goes first
    cache_salt: str | None = None  # pages are shared only among sequences of the same salt

    @property
    def num_pending_tokens(self) -> int:
        """Tokens known but not yet in the cache: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class Work:
    """Part of one sequence to run in a step: its next `num_tokens` pending tokens, guesses among them."""

    sequence: Sequence
    num_tokens: int
    samples: bool  # this piece reaches the last known token, so a new one is drawn
    draft_ids: SequenceOf[int] = ()  # guesses of what follows, the last of `num_tokens`; a token is drawn behind each

    @property
    def token_ids(self) -> list[int]:
        """The tokens to run: pending ones, then guesses."""
        begin = self.sequence.num_computed_tokens
        return [*self.sequence.token_ids[begin : begin + self.num_tokens - len(self.draft_ids)], *self.draft_ids]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Decodes of one token each stand before those with guesses, and these before prefill chunks."""

    work: tuple[Work, ...]
    num_decodes: int = 0  # that many pieces at the front run a sequence's newest token, one it generated, and no guess

    @property
    def num_tokens(self) -> int:
        """Tokens run in this step."""
        return sum([w.num_tokens for w in self.work])


@dataclass(slots=True)
class StepTimes:
    """Where the time of one engine step went, in seconds of the host. The runner fills `prepare`, `run`, `sample`.

    A device that runs beside the host is waited for in `sample`, where the tokens come back.
    """

    schedule: float = 0.0  # choosing the work, and booking what came back
    prepare: float = 0.0  # the step's tensors
    run: float = 0.0  # the model
    sample: float = 0.0  # from logits to tokens on the host
    publish: float = 0.0  # handing the tokens of the step before to the event loop


@dataclass(slots=True)
class SampledToken:
    """What the runner brings back for one piece of work that samples, and for each of its guesses."""

    token_id: int  # below 0: did not come out at the first try, and another step is launched: run the row again
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class StepOutput:
    """One event of one sequence: a token, or its end without one (deadline, error; max_tokens 0)."""

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None  # message, where finish_reason is ERROR
