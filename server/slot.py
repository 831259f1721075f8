"""The place of the model that is served. Its facts and its counters outlive it while it sleeps.

When it comes and goes is `server.lifecycle`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from server.engine.engine import Engine, EngineStats, ModelInfo
from server.engine.structured import GrammarCompiler
from spq.sizes import format_bytes

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Of EngineStats: what only grows, and so must not fall when another engine counts from 0.
COUNTERS = ("num_preemptions", "prefix_queries", "prefix_hits", "num_drafts", "num_draft_tokens", "num_accepted_tokens")


class Slot:
    """Holds an engine, or what is left to say of the last one. The tokenizer stays: it answers without weights."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are those that clients use."""
        self._names = names
        self.engine: Engine | None = None
        self.tokenizer: Tokenizer | None = None
        self.info: ModelInfo | None = None  # of the engine, or of the last one
        self._past = dict.fromkeys(COUNTERS, 0)  # of engines that are gone
        self._grammars: GrammarCompiler | None = None

    def put(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """From now on, this is the model; the log says what it is."""
        info = engine.info
        self.engine, self.tokenizer, self.info = engine, tokenizer, info
        ledger = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in info.ledger.items() if size)
        logger.info("memory on %s: %s", info.device, ledger)
        logger.info(
            "ready: %s, %d tokens of context, %d KV tokens (%s), at most %d sequences, backend %s (%s)",
            ", ".join(self._names),
            info.max_model_len,
            info.kv_tokens,
            info.kv_dtype,
            info.max_num_seqs,
            info.backend,
            info.dtype,
        )

    def clear(self) -> Engine:
        """Drop the engine, whose loop has ended, and return it: what it holds is not freed here. There must be one."""
        engine = self.engine
        assert engine is not None
        stats = engine.stats()
        self._past = {name: self._past[name] + getattr(stats, name) for name in COUNTERS}
        self.engine = self._grammars = None
        return engine

    def stats(self) -> EngineStats:
        """A reading with the counters of all engines so far."""
        if self.engine is None:
            return EngineStats(0, 0, 0.0, **self._past, last_step_s=0.0, alive=False)
        stats = self.engine.stats()
        return replace(stats, **{name: self._past[name] + getattr(stats, name) for name in COUNTERS})

    def info_now(self) -> ModelInfo | None:
        """The facts, with the bytes that are held at this moment: none while there is no engine."""
        if self.info is None or self.engine is not None:
            return self.info
        return replace(self.info, ledger=dict.fromkeys(self.info.ledger, 0))

    def grammars(self) -> GrammarCompiler:
        """What compiles schemas and grammars for the model. There must be one."""
        assert self.engine is not None and self.tokenizer is not None
        if self._grammars is None:
            info = self.engine.info
            self._grammars = GrammarCompiler(
                self.tokenizer, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids
            )
        return self._grammars
