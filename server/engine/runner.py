"""Runs one scheduled batch on the device: tensors in, sampled tokens out. The only place where a step meets torch.

On a GPU the host waits once in a step, for the sampled ids. (Frequencies that depend on lengths, and candidates that
did not suffice to a draw, make it wait again; both are rare.)
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.ops import LayerKv
from server.core import SampledToken, ScheduledBatch, Sequence, StepTimes
from server.engine import inputs, logprobs, sampler
from server.engine.graphs import DecodeGraphs
from server.engine.logprobs import TokenScores
from server.engine.transfer import download, upload
from server.model.llama import Llama

SCORED_ROWS = 64  # prompt rows turned to logits at a time: bounds rows x vocabulary


@dataclass(slots=True)
class Computed:
    """What the model made of a step, on the device."""

    logits: Tensor | None  # float32 [rows to draw from, vocab], valid until the next step; None without such rows
    scores: list[tuple[Sequence, list[TokenScores]]]  # of prompt tokens


class ModelRunner:
    """A model, its cache and the step between them."""

    def __init__(self, model: Llama, cache: list[LayerKv], block_size: int, graphs: DecodeGraphs | None = None) -> None:
        """`graphs`, where given, are recorded over the same cache."""
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._graphs = graphs
        self._page_tables = inputs.PageTables()

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> PendingRun:
        """Begin a step. A GPU works from here on by itself; a CPU computes when the result is asked for."""
        started = time.monotonic()
        host = inputs.collect(batch, self._block_size, self._page_tables)
        times.prepare = time.monotonic() - started
        pending = PendingRun(self, batch, host, times)
        if self._model.ops.device.type == "cuda":
            pending.compute()
        return pending

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Launch a step and wait for its tokens."""
        return self.launch(batch, StepTimes()).result()

    @torch.inference_mode()
    def compute(self, batch: ScheduledBatch, host: inputs.HostInputs) -> Computed:
        """The model's part of a step; on CUDA nothing is waited for."""
        model = self._model
        if self._graphs is not None and (replayed := self._graphs.run(host)) is not None:
            return Computed(replayed, [])
        step = inputs.to_device(host, self._block_size, model.ops.device)
        hidden = model.forward(step.token_ids, step.positions, host.lengths, step.attention, self._cache)
        scores = [
            (batch.work[index].sequence, self._score_prompt(batch.work[index].sequence, hidden[rows]))
            for index, rows in host.prompt_rows.items()
        ]
        if not host.sample_rows:
            return Computed(None, scores)
        return Computed(model.logits(hidden if step.sample_rows is None else hidden[step.sample_rows]), scores)

    @torch.inference_mode()
    def draw(self, batch: ScheduledBatch, computed: Computed) -> list[SampledToken]:
        """One token per sampling work and guess, in order; prompt scores go to `Sequence.prompt_logprobs`."""
        tokens = [] if computed.logits is None else sampler.sample(computed.logits, drawing_sequences(batch))
        for sequence, chunks in computed.scores:
            for chunk in chunks:
                sequence.prompt_logprobs += chunk.read(*download(chunk.tensors))
        return tokens

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
    computed: Computed | None = None

    def compute(self) -> Computed:
        """Run the model, or set the device running it."""
        started = time.monotonic()
        self.computed = self.runner.compute(self.batch, self.host)
        self.times.run = time.monotonic() - started
        return self.computed

    def result(self) -> list[SampledToken]:
        """Draw the tokens and bring them to the host."""
        computed = self.computed or self.compute()
        started = time.monotonic()
        tokens = self.runner.draw(self.batch, computed)
        self.times.sample = time.monotonic() - started
        return tokens
