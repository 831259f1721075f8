"""What the text of an answer must match, compiled: JSON schemas, regular expressions, choices and grammars.

Not HTTP (`server.api.structured` reads the requests) and not the masks of a step (`server.engine.mask`). Matching is
llguidance's, behind this one module. A client writes the grammar, so everything about it has a bound: its length, its
depth, the work to compile it, the work of a step and the memory of a matcher. Compiling happens on threads of its own,
with the interpreter lock released; what cannot be compiled, or allows no first token, is refused before one is drawn.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from server.core import mask_bytes
from server.engine.notation import Constraint, to_llguidance
from server.errors import BadRequest, Overloaded

COMPILERS = 2  # threads
MAX_PENDING = 256  # compilations that run or wait
MAX_MESSAGE_CHARS = 500
# Of llguidance. 50,000 states of a lexer took 15 MB, and last for 19,000 characters of a string of bounded length; the
# others bound a mask to some 15 ms, where 0.05 ms are usual (4,096 tokens, Zen 3). Beyond, that one sequence ends.
LIMITS: dict[str, Any] = {
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
}


class Vocabulary(Protocol):
    """What matching needs to know of a tokenizer. `server.tokenizer.Tokenizer` has it."""

    def __len__(self) -> int: ...

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes a token stands for."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which text does not show."""
        ...


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A `server.core.Grammar`."""

    param: str
    template: Any  # LLMatcher before the first token
    num_bytes: int  # of a mask

    def start(self) -> TokenMatcher:
        """A matcher of its own for one sequence: a copy, since states are found as text grows."""
        return TokenMatcher(self.template.deep_copy(), self.num_bytes)


class TokenMatcher:
    """A `server.core.Matcher`. Tokens are taken in when the next mask is asked for."""

    def __init__(self, matcher: Any, num_bytes: int) -> None:
        self.failure: str | None = None
        self._matcher = matcher
        self._num_bytes = num_bytes
        self._num_matched = 0  # tokens of the output

    def fill(self, output_ids: Sequence[int], draft_ids: Sequence[int], masks: Sequence[int]) -> None:
        """See `server.core.Matcher`."""
        if self.failure is None:
            new = list(output_ids[self._num_matched :])
            if not new or self._matcher.consume_tokens(new):
                self._num_matched += len(new)
                self._fill(draft_ids, masks)
            if self._matcher.is_error():
                self.failure = f"the answer cannot be matched any further: {_reason(self._matcher.get_error())}"

    def _fill(self, draft_ids: Sequence[int], masks: Sequence[int]) -> None:
        num_guessed = 0
        for mask, draft_id in zip(masks, (*draft_ids, None), strict=True):
            self._matcher.unsafe_compute_mask_ptr(mask, self._num_bytes)
            if draft_id is None or self._matcher.try_consume_tokens([draft_id]) == 0:
                break
            num_guessed += 1
        if num_guessed:
            self._matcher.rollback(num_guessed)


class GrammarCompiler:
    """Compiles constraints for one model. Cheap until first used.

    Nothing compiled is kept: copies of a matcher share the states that were found, and the bound on them, so a request
    that used them up would end those of others. A schema of the usual size compiles in a millisecond (Zen 3).
    """

    def __init__(self, vocabulary: Vocabulary, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_token_ids = [i for i in eos_token_ids if 0 <= i < vocab_size]
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammars")
        self._lock = threading.Lock()
        self._tokens: Any = None  # LLTokenizer
        self._num_pending = 0  # changed on the event loop only

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        """The compiled constraint, for the sequences of one request. To be called on one event loop.

        Raises BadRequest for what is wrong, unsatisfiable or too large, Overloaded where too many wait.
        """
        if not self._eos_token_ids:
            raise BadRequest("this model has no end-of-sequence token, so its text cannot be made to match",
                             param=constraint.param)  # fmt: skip
        if self._num_pending >= MAX_PENDING:
            raise Overloaded("too many schemas and grammars are being compiled; retry later", retry_after_s=1,
                             code="too_many_grammars")  # fmt: skip
        self._num_pending += 1
        compiled = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, constraint)
        compiled.add_done_callback(self._note_done)  # however the caller ended
        return await asyncio.shield(compiled)

    def _note_done(self, compiled: asyncio.Future[CompiledGrammar]) -> None:
        self._num_pending -= 1
        if not compiled.cancelled():
            compiled.exception()  # the caller may be gone

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        import llguidance  # 8 MiB, for those who use it

        grammar = to_llguidance(constraint)
        with self._lock:
            if self._tokens is None:
                self._tokens = _make_tokens(self._vocabulary, self._vocab_size, self._eos_token_ids)
        limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask: whether there is anything to draw
        if matcher.is_error():
            raise BadRequest(
                f"this {constraint.kind.replace('_', ' ')} cannot be used: {_reason(matcher.get_error())}",
                param=constraint.param,
                code="invalid_grammar",
            )
        return CompiledGrammar(constraint.param, matcher, mask_bytes(self._vocab_size))


class _TokenTable:
    """The vocabulary in llguidance's form."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_id: int) -> None:
        known = min(len(vocabulary), vocab_size)
        self.eos_token_id = eos_token_id
        self.tokens = [vocabulary.token_bytes(i) for i in range(known)] + [b""] * (vocab_size - known)
        self.special_token_ids = [i for i in range(known) if vocabulary.is_special(i)]

    def __call__(self, text: str) -> list[int]:
        """Would cut text that is forced, which `server.engine.notation` turns off."""
        raise AssertionError("no text is forced")


def _make_tokens(vocabulary: Vocabulary, vocab_size: int, eos_token_ids: list[int]) -> Any:
    import llguidance

    table: Any = _TokenTable(vocabulary, vocab_size, eos_token_ids[0])
    return llguidance.LLTokenizer(table, n_vocab=vocab_size, eos_token=eos_token_ids)


def _reason(error: str) -> str:
    """A message of llguidance on one line, without its dump of the state."""
    if "NoExtension" in error:
        return "no text matches it"
    unknown = re.search(r"Unimplemented keys: \[(.*)\]", error)
    if unknown is not None:
        return f"not served in a schema: {unknown[1]}"
    text = " ".join(error.partition("<non-verbose/>")[0].partition("<backtrace>")[0].split())
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."
