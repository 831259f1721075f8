"""Runs one scheduled batch on the device: tensors in, sampled tokens out. The only place where a step meets torch.

On a GPU the host waits once in a step, for the sampled ids. (Frequencies that depend on lengths, and candidates that
did not suffice to a draw, make it wait again; both are rare.)
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from kernels.ops import LayerKv
from server.core import SampledToken, ScheduledBatch, Sequence
from server.engine import inputs, logprobs, sampler
from server.engine.graphs import DecodeGraphs
from server.engine.logprobs import TokenScores
from server.engine.transfer import download, upload
from server.model.llama import Llama

SCORED_ROWS = 64  # prompt rows turned to logits at a time: bounds rows x vocabulary


class ModelRunner:
    """A model, its cache and the step between them."""

    def __init__(self, model: Llama, cache: list[LayerKv], block_size: int, graphs: DecodeGraphs | None = None) -> None:
        """`graphs`, where given, are recorded over the same cache."""
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._graphs = graphs
        self._page_tables = inputs.PageTables()

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """One token per sampling work, in order; prompt scores go to `Sequence.prompt_logprobs`."""
        model = self._model
        host = inputs.collect(batch, self._block_size, self._page_tables)
        sampling = [w.sequence for w in batch.work if w.samples]
        if self._graphs is not None and (replayed := self._graphs.run(host)) is not None:
            return sampler.sample(replayed, sampling)
        step = inputs.to_device(host, self._block_size, model.ops.device)
        hidden = model.forward(step.token_ids, step.positions, host.lengths, step.attention, self._cache)
        scores = [
            (batch.work[index].sequence, self._score_prompt(batch.work[index].sequence, hidden[rows]))
            for index, rows in host.prompt_rows.items()
        ]
        sampled = []
        if host.sample_rows:
            logits = model.logits(hidden if step.sample_rows is None else hidden[step.sample_rows])
            sampled = sampler.sample(logits, sampling)
        for sequence, chunks in scores:
            for chunk in chunks:
                sequence.prompt_logprobs += chunk.read(*download(chunk.tensors))
        return sampled

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
