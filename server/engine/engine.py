"""The asyncio side of the engine: submit prompts, iterate over their tokens, close the iterator to abort.

Not the loop (`loop.EngineLoop` runs in a thread of its own): this side keeps a queue per request and crosses to the
loop through its inbox, and back by one `call_soon_threadsafe` per step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from server.core import FinishReason, SamplingParams, Sequence, StepOutput, Timings
from server.engine.loop import EngineLoop
from server.errors import TOO_LONG, BadRequest, DeadlineExceeded, EngineError, Overloaded

TERMINAL_ERRORS = (FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.GRAMMAR)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served and with what limits; fixed once the engine is up. Bytes by kind in `ledger`."""

    max_model_len: int  # tokens, prompt and answer
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_tokens: int
    max_num_seqs: int
    dtype: str
    kv_dtype: str
    device: str
    backend: str
    ledger: dict[str, int]
    compression: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A reading of the live engine."""

    num_running: int
    num_waiting: int
    kv_usage: float  # 0..1, pages held by live sequences
    num_preemptions: int
    prefix_queries: int  # tokens
    prefix_hits: int  # tokens
    last_step_s: float  # monotonic time of the loop's last turn
    alive: bool
    num_drafts: int = 0  # guesses made by speculation, their tokens, and how many of these were right
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    deadline_s: float | None = None  # monotonic seconds
    priority: int = 0  # lower goes first
    cache_salt: str | None = None


class Generation(AsyncIterator[list[StepOutput]]):
    """The tokens of one request as they come: at each turn all that are there, at least one, in order.

    The last output has its finish_reason set. Iteration raises EngineError, DeadlineExceeded or BadRequest (what the
    text must match is too complex) where the sequence could not be finished. Whoever stops early calls `abort`: there
    is no other way to cancel.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.sequence = sequence
        self._engine = engine
        self._outputs: list[StepOutput] = []
        self._reader: asyncio.Future[None] | None = None  # waits for an output
        self._done = False

    async def __anext__(self) -> list[StepOutput]:
        """The outputs that have come since the last call; waits for one."""
        if self._done:
            raise StopAsyncIteration
        if not self._outputs:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        outputs, self._outputs = self._outputs, []
        last = outputs[-1]
        if last.finish_reason is None:
            return outputs
        if last.finish_reason in TERMINAL_ERRORS and len(outputs) > 1:
            self._outputs = [last]  # what was generated before goes out first
            return outputs[:-1]
        self._done = True
        self._raise_failure(last)
        return outputs

    def _raise_failure(self, output: StepOutput) -> None:
        if output.finish_reason is FinishReason.DEADLINE:
            waited = time.monotonic() - self.sequence.timings.arrived_s
            raise DeadlineExceeded(
                f"the request's deadline passed after {waited:.1f} s with {self.sequence.num_output_tokens} tokens "
                "generated; allow more time, ask for fewer tokens, or try when the server is less busy"
            )
        grammar = self.sequence.params.grammar
        if output.finish_reason is FinishReason.GRAMMAR and grammar is not None:
            raise BadRequest(output.error or "", param=grammar.param, code="grammar_too_complex")
        if output.finish_reason is FinishReason.ERROR:
            raise EngineError(output.error or "the engine failed")

    def abort(self) -> None:
        """Stop generating and free the request's memory. Does nothing after the end."""
        if not self._done:
            self._done = True
            self._engine.abort(self.sequence.request_id)

    def deliver(self, output: StepOutput) -> None:
        """Called on the event loop by the engine."""
        self._outputs.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Engine:
    """Owns the loop's thread. Everything here runs on the event loop given to `start`."""

    def __init__(self, loop: EngineLoop, info: ModelInfo, *, max_queue: int) -> None:
        self.info = info
        self._loop = loop
        self._max_queue = max_queue
        self._generations: dict[str, Generation] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """Begin serving; `event_loop` is where outputs are delivered."""

        def publish(outputs: list[StepOutput]) -> None:
            event_loop.call_soon_threadsafe(self._deliver, outputs)

        self._loop.start(publish)

    def check_room(self, count: int = 1) -> None:
        """Raise Overloaded where `count` more sequences would not be queued."""
        waiting = self._loop.num_waiting
        # what can start at once does not queue: with max_queue 0 an idle server still serves
        places = self._max_queue + max(0, self.info.max_num_seqs - self._loop.num_running)
        if waiting + count > places:
            raise Overloaded(
                f"the queue is full: {waiting} sequences wait, {count} more exceed the limit of {self._max_queue}; "
                "retry later or raise --max-queue",
                retry_after_s=self._loop.estimate_wait_s(),
            )

    def submit(self, requests: SequenceOf[GenerationRequest]) -> list[Generation]:
        """Queue all requests or none.

        Raises Overloaded (queue full, draining), BadRequest (could never fit), EngineError (engine dead).
        """
        if not self._loop.alive:
            raise EngineError("the engine has stopped after an error; the server must be restarted")
        if self._draining:
            raise Overloaded(
                "the server is shutting down; send the request to another replica", retry_after_s=5, code="draining"
            )
        for request in requests:
            self._check_fits(request)
        self.check_room(len(requests))
        generations = []
        now = time.monotonic()
        for request in requests:
            sequence = Sequence(
                request_id=request.request_id,
                token_ids=list(request.prompt_ids),
                num_prompt_tokens=len(request.prompt_ids),
                params=request.params,
                timings=Timings(arrived_s=now),
                deadline_s=request.deadline_s,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
            generation = Generation(self, sequence)
            assert request.request_id not in self._generations, "request ids must be unique"
            self._generations[request.request_id] = generation
            generations.append(generation)
            self._loop.add(sequence)
        self._idle.clear()
        return generations

    def abort(self, request_id: str) -> None:
        """Drop a live request; unknown ids are ignored (it may have just ended)."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self._loop.abort(generation.sequence)
            self._note_idle()

    def stats(self) -> EngineStats:
        """A reading of the loop; values may be one step old."""
        loop = self._loop
        scheduler = loop.scheduler
        drafter = scheduler.drafter
        return EngineStats(
            num_running=loop.num_running,
            num_waiting=loop.num_waiting,
            kv_usage=1.0 - scheduler.blocks.num_free / scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.queue.prefix_queries,
            prefix_hits=scheduler.queue.prefix_hits,
            last_step_s=loop.last_turn_s,
            alive=loop.alive,
            num_drafts=0 if drafter is None else drafter.num_drafts,
            num_draft_tokens=0 if drafter is None else drafter.num_draft_tokens,
            num_accepted_tokens=0 if drafter is None else drafter.num_accepted_tokens,
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the accepted ones end, then abort what is left and stop the loop."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for generation in list(self._generations.values()):
                generation.deliver(
                    StepOutput(
                        generation.sequence.request_id,
                        None,
                        finish_reason=FinishReason.ERROR,
                        error="the server was stopped before the answer was finished",
                    )
                )
                self.abort(generation.sequence.request_id)
        await asyncio.to_thread(self._loop.stop)

    def release(self) -> None:
        """After `drain`: let go of the model and its cache, whoever still holds this engine. Statistics stay."""
        self._loop.release()

    def _check_fits(self, request: GenerationRequest) -> None:
        prompt = len(request.prompt_ids)
        total = min(prompt + request.params.max_tokens, self.info.max_model_len)
        if prompt > self.info.max_model_len or self._loop.scheduler.never_fits(total):
            raise BadRequest(
                f"{TOO_LONG} {self.info.max_model_len} tokens in all; the prompt has {prompt} and may grow by "
                f"{request.params.max_tokens}",
                code="context_length_exceeded",
            )

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if generation is None:
                continue  # aborted while the step ran
            if output.finish_reason is not None:
                del self._generations[output.request_id]
            generation.deliver(output)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._generations:
            self._idle.set()
