"""From logits to token ids: penalties, biases, truncation, and one uniform number per token.

The uniform number is a function of (seed, index of the output token) and nothing else, so a request draws the same
tokens whatever shares its batch, and again after a preemption. Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from server.core import SampledToken, Sequence, TokenLogprobs

GREEDY_BELOW = 1e-5  # temperatures under this would overflow the logits
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1): SplitMix64 (Steele et al. 2014) at state seed + index * golden gamma, its top 53 bits."""
    z = _mix((_mix(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return (z >> 11) / (1 << 53)


def sample(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    """Draw one token per row of float32 logits [R, vocab]; row i belongs to sequences[i]. May overwrite logits."""
    wanted = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], -1) if wanted else None
    for row, sequence in enumerate(sequences):
        adjust(logits[row], sequence)
    ids = torch.argmax(logits, -1)
    random = [i for i, s in enumerate(sequences) if s.params.temperature >= GREEDY_BELOW]
    if random:
        ids[random] = _draw(logits[random], [sequences[i] for i in random])
    tokens = ids.tolist()
    if raw is None:
        return [SampledToken(t) for t in tokens]
    counts = [sequences[i].params.logprobs or 0 for i in wanted]
    scores = dict(zip(wanted, token_logprobs(raw, [tokens[i] for i in wanted], counts), strict=True))
    return [SampledToken(t, scores.get(i)) for i, t in enumerate(tokens)]


def token_logprobs(log_probs: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Score token_ids[i] in row i of log_probs [R, vocab], with the num_top[i] best tokens beside it."""
    ids = torch.tensor(token_ids, device=log_probs.device)
    chosen = log_probs.gather(1, ids[:, None])  # [R, 1]
    ranks = (log_probs > chosen).sum(-1).add_(1).tolist()
    best = torch.topk(log_probs, max(1, *num_top), -1) if any(num_top) else None
    values = best.values.tolist() if best is not None else [[]] * len(token_ids)
    indices = best.indices.tolist() if best is not None else [[]] * len(token_ids)
    return [
        TokenLogprobs(logprob, rank, tuple(zip(index[:k], value[:k], strict=True)))
        for logprob, rank, index, value, k in zip(chosen[:, 0].tolist(), ranks, indices, values, num_top, strict=True)
    ]


def adjust(row: Tensor, sequence: Sequence) -> None:
    """Apply penalties, biases and min_tokens to one row [vocab], in place."""
    params = sequence.params
    if params.repetition_penalty != 1.0:  # Keskar et al. 2019, section 4.1; over prompt and output
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:  # as OpenAI's API reference defines them
        times = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        ids = torch.tensor(list(times), dtype=torch.int64, device=row.device)
        counts = torch.tensor(list(times.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token_id, bias in params.logit_bias:
        row[token_id] += bias
    if sequence.num_output_tokens < params.min_tokens:
        for token_id in params.eos_token_ids | params.stop_token_ids:
            row[token_id] = float("-inf")


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Inverse-CDF sampling of each row. Rows that truncate are handled apart, so none depends on its neighbours."""
    params = [s.params for s in sequences]
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    probs = torch.softmax(logits / temperature[:, None], -1)
    points = torch.tensor(
        [uniform(p.seed, s.num_output_tokens) for p, s in zip(params, sequences, strict=True)],
        dtype=torch.float64,
        device=device,
    )
    ids = torch.empty(len(params), dtype=torch.int64, device=device)
    cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    whole = [i for i, p in enumerate(params) if not (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)]
    if whole:
        ids[whole] = _invert(probs[whole], points[whole])
    if cut:
        kept = [params[i] for i in cut]
        ordered, order = torch.sort(probs[cut], dim=-1, descending=True, stable=True)
        ranks = torch.arange(ordered.shape[1], device=device)
        before = ordered.cumsum(-1) - ordered  # probability of all better tokens
        keep = before < torch.tensor([[p.top_p] for p in kept], device=device)
        keep &= ranks < torch.tensor([[p.top_k or ordered.shape[1]] for p in kept], device=device)
        keep &= ordered >= torch.tensor([[p.min_p] for p in kept], device=device) * ordered[:, :1]
        keep[:, 0] = True
        picked = _invert(ordered * keep, points[cut])
        ids[cut] = order.gather(1, picked[:, None])[:, 0]
    return ids


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Smallest index whose cumulative weight exceeds point * total; weights [R, V] need not sum to 1."""
    cumulative = weights.double().cumsum(-1)
    target = points[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(weights.shape[1] - 1)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
