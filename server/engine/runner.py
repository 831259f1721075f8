"""Runs one scheduled batch on the device: tensors in, sampled tokens out. The only place where a step meets torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from kernels.ops import LayerKv
from server.core import SampledToken, ScheduledBatch, Sequence, StepTimes
from server.engine import inputs, sampler
from server.model.llama import Llama

SCORED_ROWS = 64  # prompt rows turned to logits at a time: bounds rows x vocabulary


class ModelRunner:
    """A model, its cache and the step between them."""

    def __init__(self, model: Llama, cache: list[LayerKv], block_size: int) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> PendingRun:
        """Make the step's tensors; the model runs when the result is asked for."""
        started = time.monotonic()
        step = inputs.build(batch, self._block_size, self._model.ops.device)
        times.prepare = time.monotonic() - started
        return PendingRun(self, batch, step, times)

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Launch a step and wait for its tokens."""
        return self.launch(batch, StepTimes()).result()

    @torch.inference_mode()
    def finish(self, batch: ScheduledBatch, step: inputs.StepInputs, times: StepTimes) -> list[SampledToken]:
        """One token per sampling work and guess, in order; prompt scores go to `Sequence.prompt_logprobs`."""
        started = time.monotonic()
        model = self._model
        hidden = model.forward(step.token_ids, step.positions, step.lengths, step.attention, self._cache)
        for index, rows in step.prompt_rows.items():
            self._score_prompt(batch.work[index].sequence, hidden[rows])
        logits = model.logits(hidden[step.sample_rows]) if step.sample_rows else None
        times.run = time.monotonic() - started
        if logits is None:
            return []
        tokens = sampler.sample(logits, drawing_sequences(batch))
        times.sample = time.monotonic() - started - times.run
        return tokens

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor) -> None:
        """hidden [R, hidden]: row i predicts the (i+1)-th prompt token that has no score yet."""
        for start in range(0, len(hidden), SCORED_ROWS):
            chunk = hidden[start : start + SCORED_ROWS]
            log_probs = torch.log_softmax(self._model.logits(chunk), -1)
            first = len(sequence.prompt_logprobs) + 1
            targets = sequence.token_ids[first : first + len(chunk)]
            tops = [sequence.params.prompt_logprobs or 0] * len(chunk)
            sequence.prompt_logprobs += sampler.token_logprobs(log_probs, targets, tops)


def drawing_sequences(batch: ScheduledBatch) -> list[Sequence]:
    """The sequence behind each row of logits; behind a guess, what it is if that one and those before it are right.

    So each token is drawn with the penalties, limits and random number that it has without guesses, and where a guess
    was wrong, what was drawn behind it is dropped: the answer is the same, token by token, greedy or sampled.
    """
    sequences: list[Sequence] = []
    for work in batch.work:
        if work.samples:
            sequences.append(work.sequence)
        for count in range(1, len(work.draft_ids) + 1):
            known = [*work.sequence.token_ids, *work.draft_ids[:count]]
            sequences.append(replace(work.sequence, token_ids=known))
    return sequences


@dataclass(slots=True)
class PendingRun:
    """A step whose tensors are ready."""

    runner: ModelRunner
    batch: ScheduledBatch
    step: inputs.StepInputs
    times: StepTimes

    def result(self) -> list[SampledToken]:
        """Run the model and draw the tokens."""
        return self.runner.finish(self.batch, self.step, self.times)
