"""Log-probabilities of chosen tokens with others beside them, computed on the device and read later.

The others are the best ones, or in rows that name tokens (`logprob_token_ids`) exactly those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.core import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of one token per row: on the device until `download`, then given to `read`."""

    chosen: Tensor  # float32 [R]
    ranks: Tensor  # int32 [R]: 1 = the most likely
    top_values: Tensor  # float32 [R, K], best first
    top_ids: Tensor  # int64 [R, K]
    named_values: Tensor  # float32 [N], of the tokens that rows name, row after row
    num_top: tuple[int, ...]  # how many of the best each row wants, up to K
    named: tuple[tuple[int, ...], ...]  # what each row names; empty or as many as rows

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What has to reach the host, for `read`."""
        return self.chosen, self.ranks, self.top_values, self.top_ids, self.named_values

    def read(
        self, chosen: Tensor, ranks: Tensor, top_values: Tensor, top_ids: Tensor, named_values: Tensor
    ) -> list[TokenLogprobs]:
        """One entry per row, from host copies of `tensors`."""
        rows = zip(chosen.tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist(), self.num_top, strict=True)
        entries = [
            TokenLogprobs(logprob, rank, tuple(zip(ids[:k], values[:k], strict=True)))
            for logprob, rank, ids, values, k in rows
        ]
        values = iter(named_values.tolist())
        for row, ids in enumerate(self.named):
            if ids:
                entries[row] = replace(entries[row], top=tuple((token_id, next(values)) for token_id in ids))
        return entries


def score(
    log_probs: Tensor,
    token_ids: Tensor,
    num_top: Sequence[int],
    named: Sequence[tuple[int, ...]] = (),
    named_places: Tensor | None = None,
) -> TokenScores:
    """Score token_ids int64 [R] in rows of log_probs float32 [R, vocab], each with its num_top best.

    `named` are the tokens to score in place of the best, for each row; named_places int64 [N] where they stand in the
    flattened log_probs, row after row.
    """
    chosen = log_probs.gather(1, token_ids[:, None])
    # summed as int32: bool sums of 256 x 32,000 take 69 ms on a Zen 3 core, these 11 ms
    ranks = (log_probs > chosen).sum(-1, dtype=torch.int32) + 1
    best = torch.topk(log_probs, max(num_top, default=0), -1)
    values = log_probs[0, :0] if named_places is None else log_probs.view(-1)[named_places]
    return TokenScores(chosen[:, 0], ranks, best.values, best.indices, values, tuple(num_top), tuple(named))
