"""From logits to token ids for all rows of a step at once: adjust, draw, score, and one wait to read the result.

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
from server.engine.transfer import Column, download, upload

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


def sample(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    """Draw one token per row of float32 logits [R, vocab]; row i belongs to sequences[i]. May overwrite logits."""
    whole, cut, scored, num_top = _sort_rows(sequences)
    adjustments = penalties.collect(sequences, logits.shape[1])
    if not (whole.index or cut.index or scored or adjustments):
        [ids] = download([draw.greedy(logits)])
        return [SampledToken(token_id) for token_id in ids.tolist()]
    changes = () if adjustments is None else adjustments.columns
    columns = upload([*whole.columns, *cut.columns, scored, *changes], logits.device)
    to_whole, to_cut, to_scored, to_change = columns[:6], columns[6:12], columns[12], columns[13:]
    raw = torch.log_softmax(logits[to_scored], -1) if scored else None
    if to_change:
        penalties.apply(logits, *to_change)
    # every row has a best token, drawn or not; where all are drawn the place is only filled
    drawn = len(whole.index) + len(cut.index)
    ids = draw.greedy(logits) if drawn < len(sequences) else torch.empty_like(logits[:, 0], dtype=torch.int64)
    if whole.index:
        index, temperature, points = to_whole[:3]
        ids[index] = draw.draw(_take(logits, index), temperature, points)
    widths = iter((*(CUDA_CANDIDATES if logits.is_cuda else CPU_CANDIDATES), logits.shape[1]))
    while True:
        settled = _draw_cut(logits, to_cut, next(widths), ids) if len(to_cut[0]) else None
        scores = None if raw is None else logprobs.score(raw, ids[to_scored], num_top)
        results = [ids, *(() if settled is None else (settled,)), *(() if scores is None else scores.tensors)]
        host = download(results)
        if settled is None or all(kept := host[1].tolist()):
            break
        again = array("q", [row for row, ok in enumerate(kept) if not ok])
        [rows] = upload([again], logits.device)
        to_cut = [column[rows] for column in to_cut]
    tokens = [SampledToken(token_id) for token_id in host[0].tolist()]
    if scores is not None:
        for row, entry in zip(scored, scores.read(*host[-4:]), strict=True):
            tokens[row] = SampledToken(tokens[row].token_id, entry)
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
            num_top.append(params.logprobs)
    return whole, cut, scored, num_top


def _draw_cut(logits: Tensor, columns: list[Tensor], num_candidates: int, ids: Tensor) -> Tensor:
    """Draw the rows of `columns` (see _Rows) into ids int64 [R]; returns which are settled, bool [rows]."""
    index, temperature, points, top_k, top_p, min_p = columns
    ids[index], settled = draw.draw_truncated(
        _take(logits, index), temperature, points, top_k, top_p, min_p, num_candidates
    )
    return settled


def _take(logits: Tensor, index: Tensor) -> Tensor:
    """Rows of the logits, copied only where some are left out."""
    return logits if len(index) == len(logits) else logits[index]


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
