"""From logits to token ids for all rows of a step at once: adjust, draw, score, and one wait to read the result.

A `Draw` has its ids on the device as soon as it has begun, so the next step may be launched before they are read.

The uniform number of a draw is a function of (seed, index of the output token) and nothing else, so a request draws
the same tokens whatever shares its batch, and again after a preemption. Log-probabilities are those of the raw logits.
The numbers are made on the host and sent along: no generator lives on the device, and a seed means the same on each.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.core import SampledToken, Sequence
from server.engine import draw, logprobs, penalties
from server.engine.transfer import Column, Download, upload

GREEDY_BELOW = 1e-5  # temperatures under this would overflow the logits
# Candidates looked at before a row that may keep more is drawn again from the next number, at last from all tokens.
# On CUDA, looking at the result is a wait for the device, so the first try has to do.
CPU_CANDIDATES = (64, 1024)
CUDA_CANDIDATES = (1024,)
_MASK = (1 << 64) - 1


@dataclass(slots=True)
class _Rows:
    """Rows to draw in the same way, with what each asks for."""

    index: array[int] = field(default_factory=lambda: array("q"))
    temperature: array[float] = field(default_factory=lambda: array("d"))
    points: array[float] = field(default_factory=lambda: array("d"))
    top_k: array[int] = field(default_factory=lambda: array("q"))
    top_p: array[float] = field(default_factory=lambda: array("d"))
    min_p: array[float] = field(default_factory=lambda: array("d"))

    def add(self, row: int, sequence: Sequence) -> None:
        """Append one row."""
        params = sequence.params
        self.index.append(row)
        self.temperature.append(params.temperature)
        self.points.append(uniform(params.seed, sequence.num_output_tokens))
        self.top_k.append(params.top_k)
        self.top_p.append(params.top_p)
        self.min_p.append(params.min_p)

    @property
    def columns(self) -> tuple[Column, ...]:
        """What goes to the device."""
        return self.index, self.temperature, self.points, self.top_k, self.top_p, self.min_p


class Draw:
    """One token for each row of float32 logits [R, vocab]; row i belongs to sequences[i]."""

    ids: Tensor  # int64 [R], on the device

    def __init__(self, logits: Tensor, sequences: list[Sequence]) -> None:
        """Begin, without a wait. May overwrite the logits; looks at the sequences now, not later."""
        whole, cut, self._scored, self._num_top = _sort_rows(sequences)
        self._named = [sequences[row].params.logprob_token_ids for row in self._scored]
        vocab = logits.shape[1]
        named = array("q", [i * vocab + token_id for i, ids in enumerate(self._named) for token_id in ids])
        adjustments = penalties.collect(sequences, vocab)
        self._logits: Tensor | None = logits
        self._raw: Tensor | None = None  # log-probabilities of the rows to score
        self._cut_rows, self._cut = cut.index, list[Tensor]()  # rows drawn from the best, and what they ask for
        self._widths = iter((*(CUDA_CANDIDATES if logits.is_cuda else CPU_CANDIDATES), vocab))
        if not (whole.index or cut.index or self._scored or adjustments):
            self.ids = draw.greedy(logits)
            self._result = Download([self.ids])
            return
        changes = () if adjustments is None else adjustments.columns
        columns = upload([*whole.columns, *cut.columns, self._scored, named, *changes], logits.device)
        to_whole, self._cut, to_change = columns[:6], columns[6:12], columns[14:]
        self._to_scored, self._to_named = columns[12:14]
        if self._scored:
            self._raw = torch.log_softmax(logits[self._to_scored], -1)
        if to_change:
            penalties.apply(logits, *to_change)
        # every row has a best token, drawn or not; where all are drawn the place is only filled
        drawn = len(whole.index) + len(cut.index)
        self.ids = draw.greedy(logits) if drawn < len(sequences) else torch.empty_like(logits[:, 0], dtype=torch.int64)
        if whole.index:
            index, temperature, points = to_whole[:3]
            self.ids[index] = draw.draw(_take(logits, index), temperature, points)
        self._draw_cut(logits)

    def _draw_cut(self, logits: Tensor) -> None:
        """Draw the rows of `_cut` from the next number of candidates, and send the result of all rows on its way."""
        results = [self.ids]
        if self._cut_rows:
            index, temperature, points, top_k, top_p, min_p = self._cut
            rows = _take(logits, index)
            self.ids[index], settled = draw.draw_truncated(
                rows, temperature, points, top_k, top_p, min_p, next(self._widths)
            )
            results.append(settled)
        if self._raw is not None:
            drawn = self.ids[self._to_scored]
            self._scores = logprobs.score(self._raw, drawn, self._num_top, self._named, self._to_named)
            results += self._scores.tensors
        self._result = Download(results)

    def forget_logits(self) -> None:
        """Another step is about to take their place: what the candidates did not suffice for cannot be drawn again."""
        self._logits = self._raw = None

    @torch.inference_mode()
    def read(self) -> list[SampledToken]:
        """Wait for the tokens. Where candidates did not suffice and the logits are forgotten, the id is below 0."""
        while True:
            host = self._result.wait()
            kept = host[1].tolist() if self._cut_rows else []
            missing = [i for i, settled in enumerate(kept) if not settled]
            if not missing or self._logits is None:
                break
            [again] = upload([array("q", missing)], self._logits.device)
            self._cut = [column[again] for column in self._cut]
            self._cut_rows = array("q", [self._cut_rows[i] for i in missing])
            self._draw_cut(self._logits)
        tokens = [SampledToken(token_id) for token_id in host[0].tolist()]
        if self._scored:
            for row, entry in zip(self._scored, self._scores.read(*host[-5:]), strict=True):
                tokens[row].logprobs = entry
        for i in missing:
            tokens[self._cut_rows[i]] = SampledToken(-1)
        self.forget_logits()
        return tokens


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1): SplitMix64 (Steele et al. 2014) at state seed + index * golden gamma, its top 53 bits."""
    z = _mix((_mix(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return (z >> 11) / (1 << 53)


def _sort_rows(sequences: list[Sequence]) -> tuple[_Rows, _Rows, array[int], list[int]]:
    """Rows drawn from all tokens, rows drawn from the best, rows to score and how many best each of them wants."""
    whole, cut = _Rows(), _Rows()
    scored, num_top = array("q"), []
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if params.temperature >= GREEDY_BELOW:
            truncates = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
            (cut if truncates else whole).add(row, sequence)
        if params.logprobs is not None:
            scored.append(row)
            num_top.append(0 if params.logprob_token_ids else params.logprobs)
    return whole, cut, scored, num_top


def _take(logits: Tensor, index: Tensor) -> Tensor:
    """Rows of the logits, copied only where some are left out."""
    return logits if len(index) == len(logits) else logits[index]


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
