"""What requests change about logits before a token is drawn: penalties, biases, tokens that are forbidden for now.

Collected from all sequences of a step as lists of places and numbers, applied by a few device operations.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import Sequence
from server.engine.transfer import Column

BAD_WORD = -1e30  # no chance beside any other token; not minus infinity, for where bad words are all that is allowed


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Changes of flattened logits [R * vocab]."""

    penalised: Tensor  # int64: places of all tokens seen under a repetition penalty, repeated as they were seen
    penalties: Tensor  # float64: the penalty at each
    added: array[int]  # places, each once
    addends: array[float]
    limited: array[int]  # rows in which only the places of `allowed` may be drawn
    allowed: array[int]

    @property
    def columns(self) -> tuple[Column, ...]:
        """What goes to the device, for `apply`."""
        return self.penalised, self.penalties, self.added, self.addends, self.limited, self.allowed


def collect(sequences: SequenceOf[Sequence], vocab: int) -> Adjustments | None:
    """What the sequences ask for, row i of the logits being sequence i's; None where nobody asks for anything."""
    rows: list[int] = []  # with a repetition penalty
    seen = array("q")
    added, addends = array("q"), array("d")
    limited, allowed = array("q"), array("q")
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if params.repetition_penalty != 1.0:
            rows.append(row)
            seen.extend(sequence.token_ids)
        for token_id, addend in _addends(sequence).items():
            added.append(row * vocab + token_id)
            addends.append(addend)
        if params.allowed_token_ids:
            limited.append(row)
            allowed.extend([row * vocab + token_id for token_id in params.allowed_token_ids])
    if not (rows or added or limited):
        return None
    counts = torch.tensor([len(sequences[row].token_ids) for row in rows], dtype=torch.int64)
    first = torch.tensor(rows, dtype=torch.int64).mul_(vocab).repeat_interleave(counts)
    penalties = torch.tensor([sequences[row].params.repetition_penalty for row in rows], dtype=torch.float64)
    ids = torch.frombuffer(seen, dtype=torch.int64) if seen else first
    return Adjustments(first + ids, penalties.repeat_interleave(counts), added, addends, limited, allowed)


def apply(
    logits: Tensor,
    penalised: Tensor,
    penalties: Tensor,
    added: Tensor,
    addends: Tensor,
    limited: Tensor,
    allowed: Tensor,
) -> None:
    """Change logits float32 [R, vocab] in place by the columns of `Adjustments`, on its device."""
    flat = logits.view(-1)
    if len(penalised):  # Keskar et al. 2019, section 4.1; over prompt and output
        scores, factors = flat[penalised], penalties.to(flat.dtype)
        flat[penalised] = torch.where(scores > 0, scores / factors, scores * factors)
    if len(added):
        flat[added] += addends.to(flat.dtype)
    if len(limited):
        kept = flat[allowed]
        logits[limited] = float("-inf")
        flat[allowed] = kept


def _addends(sequence: Sequence) -> dict[int, float]:
    """What is added to the logits of one sequence, by token."""
    params = sequence.params
    found: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:  # as OpenAI's API reference defines them
        for token_id, count in Counter(sequence.token_ids[sequence.num_prompt_tokens :]).items():
            found[token_id] = -params.presence_penalty - params.frequency_penalty * count
    for token_id, bias in params.logit_bias:
        found[token_id] = found.get(token_id, 0.0) + bias
    for *before, last in params.bad_words:
        begin = len(sequence.token_ids) - len(before)
        if begin >= sequence.num_prompt_tokens and sequence.token_ids[begin:] == before:
            found[last] = BAD_WORD
    if sequence.num_output_tokens < params.min_tokens:
        for token_id in params.eos_token_ids | params.stop_token_ids:
            found[token_id] = float("-inf")
    return found
