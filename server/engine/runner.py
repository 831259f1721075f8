"""Runs one scheduled batch on the device: tensors in, sampled tokens out. The only place where a step meets torch.

On a GPU the host waits once in a step, for the sampled ids, and the next step may be launched before: an id that the
host does not know yet is taken from the draw on the device. (Frequencies that depend on lengths, and candidates that
did not suffice to a draw, make it wait again; both are rare.)
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.ops import LayerKv
from server.core import SampledToken, ScheduledBatch, Sequence, StepTimes
from server.engine import inputs, logprobs, sampler
from server.engine.graphs import DecodeGraphs
from server.engine.logprobs import TokenScores
from server.engine.transfer import Download, upload
from server.model.llama import Llama

SCORED_ROWS = 64  # prompt rows turned to logits at a time: bounds rows x vocabulary

PromptScores = list[tuple[Sequence, list[TokenScores]]]


@dataclass(slots=True)
class PromptResults:
    """What a step computed of prompts beside their keys and values, on the device."""

    scores: PromptScores = field(default_factory=list)
    pooled: list[tuple[Sequence, int, Tensor]] = field(default_factory=list)  # tokens, and their sum float32 [hidden]


class ModelRunner:
    """A model, its cache and the step between them."""

    def __init__(self, model: Llama, cache: list[LayerKv], block_size: int, graphs: DecodeGraphs | None = None) -> None:
        """`graphs`, where given, are recorded over the same cache."""
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._graphs = graphs
        self._page_tables = inputs.PageTables()
        self._newest: sampler.Draw | None = None  # of the step launched last, if that draws
        self.runs_ahead = model.ops.device.type == "cuda"  # a CPU would compute both steps on the same cores

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> PendingRun:
        """Begin a step. A GPU works from here on by itself; a CPU computes when the result is asked for."""
        started = time.monotonic()
        host = inputs.collect(batch, self._block_size, self._page_tables)
        times.prepare = time.monotonic() - started
        pending = PendingRun(self, batch, host, times)
        if self.runs_ahead:
            pending.compute()
        return pending

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Launch a step and wait for its tokens."""
        return self.launch(batch, StepTimes()).result()

    @torch.inference_mode()
    def compute(self, batch: ScheduledBatch, host: inputs.HostInputs) -> tuple[Tensor | None, PromptResults]:
        """The model's part of a step: float32 logits [rows to draw from, vocab], valid until the next step, or None
        without such rows; and what is asked for of prompts. On CUDA nothing is waited for."""
        model, drawn = self._model, None
        if self._newest is not None:
            self._newest.forget_logits()
            drawn = self._newest.ids
        if self._graphs is not None and (replayed := self._graphs.run(host, drawn)) is not None:
            return replayed, PromptResults()
        step = inputs.to_device(host, self._block_size, model.ops.device)
        if host.awaits_tokens:
            inputs.resolve(step.token_ids, drawn)
        hidden = model.forward(step.token_ids, step.positions, host.lengths, step.attention, self._cache)
        found = PromptResults()
        for index, rows in host.prompt_rows.items():
            sequence = batch.work[index].sequence
            found.scores.append((sequence, self._score_prompt(sequence, hidden[rows])))
        for index, rows in host.pooled_rows.items():
            states = model.states(hidden[rows]).float()
            found.pooled.append((batch.work[index].sequence, len(states), states.sum(0)))
        if not host.sample_rows:
            return None, found
        return model.logits(hidden if step.sample_rows is None else hidden[step.sample_rows]), found

    @torch.inference_mode()
    def draw(self, batch: ScheduledBatch, logits: Tensor | None) -> sampler.Draw | None:
        """Begin to draw one token per sampling work and guess, in order."""
        self._newest = None if logits is None else sampler.Draw(logits, drawing_sequences(batch))
        return self._newest

    def _score_prompt(self, sequence: Sequence, hidden: Tensor) -> list[TokenScores]:
        """hidden [R, hidden]: row i predicts the (i+1)-th prompt token that has no score yet."""
        first = len(sequence.prompt_logprobs) + 1
        chunks = []
        for start in range(0, len(hidden), SCORED_ROWS):
            rows = hidden[start : start + SCORED_ROWS]
            log_probs = torch.log_softmax(self._model.logits(rows), -1)
            targets = sequence.token_ids[first + start : first + start + len(rows)]
            [ids] = upload([array("q", targets)], rows.device)
            chunks.append(logprobs.score(log_probs, ids, [sequence.params.prompt_logprobs or 0] * len(rows)))
        return chunks


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
    """A step on its way."""

    runner: ModelRunner
    batch: ScheduledBatch
    host: inputs.HostInputs
    times: StepTimes
    draw: sampler.Draw | None = None
    found: PromptResults | None = None  # None until computed

    def compute(self) -> PromptResults:
        """Run the model and begin to draw, or set the device doing it."""
        started = time.monotonic()
        logits, self.found = self.runner.compute(self.batch, self.host)
        ran = time.monotonic()
        self.draw = self.runner.draw(self.batch, logits)
        self.times.run = ran - started
        self.times.sample = time.monotonic() - ran
        return self.found

    def result(self) -> list[SampledToken]:
        """Bring the tokens to the host; what was computed of prompts goes to their sequences."""
        found = self.compute() if self.found is None else self.found
        started = time.monotonic()
        tokens = [] if self.draw is None else self.draw.read()
        for sequence, num_tokens, states in found.pooled:
            sequence.states.add(Download([states]).wait()[0].tolist(), num_tokens)
        for sequence, chunks in found.scores:
            for chunk in chunks:
                sequence.prompt_logprobs += chunk.read(*Download(chunk.tensors).wait())
        self.times.sample += time.monotonic() - started
        return tokens
