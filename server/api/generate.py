"""Token ids in, text deltas and usage out: what chat and completions, streamed or not, have in common.

No HTTP and no JSON. The single place that submits to the engine, counts tokens (for `usage` and for the metrics, from
the same events), and aborts: closing the iterator is the only way to stop, and it always aborts what still runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from server.api.answer import Answer, Delta, Plan
from server.api.record import Asked, Phases, current_record
from server.api.sampling import with_sibling_seed
from server.core import StepOutput
from server.engine.engine import Engine, Generation, GenerationRequest
from server.errors import EngineError
from server.metrics import Metrics
from server.tokenizer import Tokenizer

UNFINISHED = "the engine stopped sending tokens before the answer had ended"


@dataclass(slots=True)
class TokenCounts:
    """What `usage` reports, grown as tokens are handed out."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    phases: Phases | None = None  # once all answers ended, where the client asked for times


async def generate(
    plan: Plan, engine: Engine, tokenizer: Tokenizer, metrics: Metrics, counts: TokenCounts
) -> AsyncGenerator[list[Delta]]:
    """Submit on first use and yield the deltas that are there, answers interleaved; `counts` grows along.

    Raises what `Engine.submit` raises before the first delta, EngineError and DeadlineExceeded at any time. Close the
    iterator (aclosing) however the iteration ends.
    """
    requests = [
        GenerationRequest(
            f"{plan.engine_id}-{p * plan.n + i}",
            prompt.ids,
            with_sibling_seed(prompt.params, i),
            plan.deadline_s,
            plan.priority,
            plan.cache_salt,
        )
        for p, prompt in enumerate(plan.prompts)
        for i in range(plan.n)
    ]
    generations = engine.submit(requests)
    try:
        answers = [Answer(i, plan, generation, tokenizer) for i, generation in enumerate(generations)]
        meter = _Meter(plan, answers, metrics, counts)
    except BaseException:
        _abort(generations)
        raise
    outputs = _merge(answers)
    try:
        async for answer, events in outputs:
            deltas = meter.feed(answer, events)
            if answer.ended is not None:
                answer.generation.abort()
            if deltas:
                yield deltas
    except Exception:
        meter.failed = True
        raise
    finally:
        _abort(generations)
        await outputs.aclose()
        meter.close()


class _Meter:
    """Feeds the answers, and counts every event they took once, for `usage` and the metrics alike."""

    def __init__(self, plan: Plan, answers: list[Answer], metrics: Metrics, counts: TokenCounts) -> None:
        self.failed = False
        self._plan = plan
        self._answers = answers
        self._metrics = metrics
        self._counts = counts
        self._record = current_record()
        params = plan.prompts[0].params
        self._record.asked = Asked(
            plan.response_id, plan.n, len(answers), params.max_tokens, params.temperature, params.top_p
        )
        self._seen: set[int] = set()  # prompts whose first output came, by index

    def feed(self, answer: Answer, outputs: list[StepOutput]) -> list[Delta]:
        """The visible deltas of a live answer's next events. Those after its end (a stop string) count for nothing."""
        deltas: list[Delta] = []
        num_tokens = 0
        try:
            for output in outputs:
                num_tokens += output.token_id is not None
                delta = answer.feed(output)
                if delta.text or delta.finish_reason is not None:
                    deltas.append(delta)
                if answer.ended is not None:
                    break
        finally:
            self._count(answer, num_tokens)
        return deltas

    def _count(self, answer: Answer, num_tokens: int) -> None:
        sequence, metrics, counts = answer.generation.sequence, self._metrics, self._counts
        if answer.prompt_index not in self._seen:
            self._seen.add(answer.prompt_index)
            counts.prompt += sequence.num_prompt_tokens
            counts.cached += sequence.num_cached_tokens
            metrics.prompt(sequence.num_prompt_tokens, sequence.num_cached_tokens)
            self._record.add_prompt(sequence.num_prompt_tokens, sequence.num_cached_tokens)
        if not num_tokens:
            return
        now = time.monotonic()
        num_later = num_tokens
        if answer.last_token_s is None:
            metrics.first_token(now - sequence.timings.arrived_s)
            answer.last_token_s = now
            num_later -= 1
        if num_later:
            metrics.next_tokens(now - answer.last_token_s, num_later)
        answer.last_token_s = now
        answer.num_tokens += num_tokens
        counts.completion += num_tokens
        metrics.tokens(num_tokens)
        self._record.add_tokens(num_tokens)

    def close(self) -> None:
        """Record how every answer ended."""
        unfinished = "error" if self.failed else "abort"
        for answer in self._answers:
            self._metrics.sequence_ended(
                answer.generation.sequence,
                num_tokens=answer.num_tokens,
                reason=answer.ended or unfinished,
                last_token_s=answer.last_token_s,
            )
        n = self._plan.n
        for p, prompt in enumerate(self._plan.prompts):
            longest = max(answer.num_tokens for answer in self._answers[p * n : (p + 1) * n])
            self._metrics.prompt_ended(prompt.params, n=n, max_num_tokens=longest)
        self._record.finish_reasons += [answer.ended or unfinished for answer in self._answers]
        self._record.phases = _phases(self._answers)
        if self._record.wants_timings:
            self._counts.phases = self._record.phases


def _phases(answers: Sequence[Answer]) -> Phases:
    timings = [answer.generation.sequence.timings for answer in answers]
    return Phases(
        min(t.arrived_s for t in timings),
        min((t.scheduled_s for t in timings if t.scheduled_s is not None), default=None),
        min((t.first_token_s for t in timings if t.first_token_s is not None), default=None),
        max((answer.last_token_s for answer in answers if answer.last_token_s is not None), default=None),
    )


async def _merge(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, list[StepOutput]]]:
    """The outputs of all answers as they come. An answer that has `ended` yields no more."""
    if len(answers) == 1:
        async for outputs in answers[0].generation:
            yield answers[0], outputs
            if answers[0].ended is not None:
                return
        raise EngineError(UNFINISHED)
    queue: asyncio.Queue[tuple[Answer, list[StepOutput] | Exception]] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        try:
            async for outputs in answer.generation:
                queue.put_nowait((answer, outputs))
            raise EngineError(UNFINISHED)  # not read where the answer has ended
        except Exception as error:
            queue.put_nowait((answer, error))

    tasks = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        while any(answer.ended is None for answer in answers):
            answer, event = await queue.get()
            if answer.ended is not None:
                continue
            if isinstance(event, Exception):
                raise event
            yield answer, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _abort(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.abort()
