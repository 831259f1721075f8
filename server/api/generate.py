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


async def generate(
    plan: Plan, engine: Engine, tokenizer: Tokenizer, metrics: Metrics, counts: TokenCounts
) -> AsyncGenerator[Delta]:
    """Submit on first use and yield deltas, answers interleaved; `counts` grows along.

    Raises what `Engine.submit` raises before the first delta, EngineError and DeadlineExceeded at any time. Close the
    iterator (aclosing) however the iteration ends.
    """
    requests = [
        GenerationRequest(
            f"{plan.response_id}-{p * plan.n + i}", prompt.ids, with_sibling_seed(prompt.params, i), plan.deadline_s
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
        async for answer, output in outputs:
            meter.count(answer, output)
            delta = answer.feed(output)
            if answer.ended is not None:
                answer.generation.abort()
            if delta.text or delta.finish_reason is not None:
                yield delta
    except Exception:
        meter.failed = True
        raise
    finally:
        _abort(generations)
        await outputs.aclose()
        meter.close()


class _Meter:
    """Counts every event once, for `usage` and the metrics alike."""

    def __init__(self, plan: Plan, answers: list[Answer], metrics: Metrics, counts: TokenCounts) -> None:
        self.failed = False
        self._plan = plan
        self._answers = answers
        self._metrics = metrics
        self._counts = counts
        self._seen: set[int] = set()  # prompts whose first output came, by index

    def count(self, answer: Answer, output: StepOutput) -> None:
        """One event of a live answer."""
        sequence, metrics, counts = answer.generation.sequence, self._metrics, self._counts
        if answer.prompt_index not in self._seen:
            self._seen.add(answer.prompt_index)
            counts.prompt += sequence.num_prompt_tokens
            counts.cached += sequence.num_cached_tokens
            metrics.prompt(sequence.num_prompt_tokens, sequence.num_cached_tokens)
        if output.token_id is None:
            return
        now = time.monotonic()
        if answer.last_token_s is None:
            metrics.first_token(now - sequence.timings.arrived_s)
        else:
            metrics.next_tokens(now - answer.last_token_s, 1)
        answer.last_token_s = now
        answer.num_tokens += 1
        counts.completion += 1
        metrics.tokens(1)

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


async def _merge(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, StepOutput]]:
    """The outputs of all answers as they come. An answer that has `ended` yields no more."""
    if len(answers) == 1:
        async for output in answers[0].generation:
            yield answers[0], output
            if answers[0].ended is not None:
                return
        raise EngineError(UNFINISHED)
    queue: asyncio.Queue[tuple[Answer, StepOutput | Exception]] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        try:
            async for output in answer.generation:
                queue.put_nowait((answer, output))
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
