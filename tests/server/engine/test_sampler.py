"""Sampling: truncation, penalties, seeds that depend on nothing else, and log-probabilities of the raw logits."""

from __future__ import annotations

import math

import pytest
import torch

from server.core import SamplingParams, Sequence, Timings
from server.engine import penalties
from server.engine.sampler import Draw, uniform
from server.engine.transfer import upload

VOCAB = 50


def sequence(prompt: int = 3, output: tuple[int, ...] = (), **params: object) -> Sequence:
    options: dict[str, object] = {"max_tokens": 99, **params}
    ids = [*range(prompt), *output]
    return Sequence("s", ids, prompt, SamplingParams(**options), Timings(0.0))  # type: ignore[arg-type]


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draws(row: torch.Tensor, count: int = 4000, **params: object) -> torch.Tensor:
    """Frequencies of `count` independent draws from one row of logits."""
    sequences = [sequence(seed=i, **params) for i in range(count)]
    ids = [t.token_id for t in Draw(row.repeat(count, 1), sequences).read()]
    return torch.bincount(torch.tensor(ids), minlength=VOCAB) / count


def adjusted(row: torch.Tensor, item: Sequence) -> torch.Tensor:
    """One row [vocab] as the sampler changes it."""
    rows = row[None].clone()
    found = penalties.collect([item], VOCAB)
    if found is not None:
        penalties.apply(rows, *upload(found.columns, rows.device))
    return rows[0]


def test_temperature_zero_is_argmax() -> None:
    rows = logits(5)
    assert [t.token_id for t in Draw(rows.clone(), [sequence(temperature=0.0) for _ in range(5)]).read()] == (
        rows.argmax(-1).tolist()
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    row = logits()
    target = torch.softmax(row[0] / temperature, -1)
    # standard error of a frequency is at most sqrt(0.25 / 4000) = 0.008; five of them bound the largest of 50
    assert (draws(row, temperature=temperature) - target).abs().max() < 5 * 0.008


def test_truncations_leave_exactly_the_tokens_they_should() -> None:
    row = logits(seed=1)
    probs = torch.softmax(row[0], -1)
    order = probs.argsort(descending=True)
    assert set(draws(row, top_k=4).nonzero()[:, 0].tolist()) == set(order[:4].tolist())
    kept = int((probs[order].cumsum(0) - probs[order] < 0.8).sum())
    assert set(draws(row, top_p=0.8).nonzero()[:, 0].tolist()) == set(order[:kept].tolist())
    above = (probs >= 0.2 * probs.max()).nonzero()[:, 0].tolist()
    assert set(draws(row, min_p=0.2).nonzero()[:, 0].tolist()) == set(above)
    assert set(draws(row, top_p=1e-9).nonzero()[:, 0].tolist()) == {int(order[0])}


def test_a_seed_draws_the_same_whatever_shares_the_batch() -> None:
    rows = logits(6, seed=2)
    kinds = [{"top_k": 5}, {}, {"temperature": 0.0}, {"top_p": 0.7}, {"min_p": 0.1}, {"logprobs": 2}]
    together = Draw(rows.clone(), [sequence(seed=7, **k) for k in kinds]).read()
    for i, kind in enumerate(kinds):
        assert Draw(rows[i : i + 1].clone(), [sequence(seed=7, **kind)]).read()[0] == together[i]


def test_uniform_is_uniform_and_distinct() -> None:
    values = torch.tensor([uniform(seed, index) for seed in range(-50, 50) for index in range(50)], dtype=torch.float64)
    assert values.unique().numel() == values.numel()
    assert values.min() >= 0 and values.max() < 1
    # the mean of 5000 uniforms has a standard error of sqrt(1 / 12 / 5000) = 0.004
    assert abs(values.mean() - 0.5) < 4 * 0.004
    quarters = torch.histc(values, 4, 0, 1) / values.numel()
    assert (quarters - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 5000)


def test_penalties_match_their_definitions() -> None:
    row = logits(seed=3)[0]
    item = sequence(2, (5, 5, 9), repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3)
    expected = row.clone()
    for token in {0, 1, 5, 9}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in ((5, 2), (9, 1)):
        expected[token] -= 0.4 + 0.3 * count
    torch.testing.assert_close(adjusted(row, item), expected)


def test_logit_bias_forces_and_forbids() -> None:
    row = logits(seed=4)
    best = int(row.argmax())
    assert Draw(row.clone(), [sequence(temperature=0.0, logit_bias=((best, -100.0),))]).read()[0].token_id != best
    assert Draw(row.clone(), [sequence(temperature=0.0, logit_bias=((17, 100.0),))]).read()[0].token_id == 17


def test_min_tokens_forbids_every_end() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3], row[0, 4] = 50.0, 40.0
    ends = {"eos_token_ids": frozenset({3}), "stop_token_ids": frozenset({4}), "temperature": 0.0}
    assert Draw(row.clone(), [sequence(min_tokens=1, **ends)]).read()[0].token_id not in (3, 4)
    assert Draw(row.clone(), [sequence(output=(8,), min_tokens=1, **ends)]).read()[0].token_id == 3


def test_logprobs_are_of_the_raw_logits() -> None:
    row = logits(seed=5)
    scores = torch.log_softmax(row[0], -1)
    token = Draw(row.clone(), [sequence(temperature=0.0, logprobs=3, logit_bias=((11, 100.0),))]).read()[0]
    assert token.logprobs is not None
    assert token.token_id == 11
    assert token.logprobs.logprob == pytest.approx(scores[11].item())
    assert token.logprobs.rank == int((scores > scores[11]).sum()) + 1
    assert [i for i, _ in token.logprobs.top] == scores.topk(3).indices.tolist()
    assert Draw(row.clone(), [sequence(logprobs=0)]).read()[0].logprobs.top == ()  # type: ignore[union-attr]


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    row = logits(seed=6)
    assert Draw(row.clone(), [sequence(temperature=1e-30)]).read()[0].token_id == int(row.argmax())


def test_only_allowed_tokens_are_drawn() -> None:
    row = logits(seed=4)
    best = int(row.argmax())
    allowed = (3, 7, 11) if best not in (3, 7, 11) else (4, 8, 12)
    target = torch.zeros(VOCAB)
    target[list(allowed)] = torch.softmax(row[0, list(allowed)], -1)
    assert (draws(row, allowed_token_ids=allowed) - target).abs().max() < 5 * 0.008
    assert set(draws(row, allowed_token_ids=allowed, top_k=2).nonzero()[:, 0].tolist()) < set(allowed)
    rows = logits(3, seed=4)
    items = [sequence(temperature=0.0, allowed_token_ids=ids) for ids in ((), allowed, ())]
    free, bound, other = Draw(rows.clone(), items).read()
    assert [free.token_id, other.token_id] == [int(rows[0].argmax()), int(rows[2].argmax())]
    assert bound.token_id == max(allowed, key=lambda i: float(rows[1, i]))


def test_a_bad_word_may_not_be_completed() -> None:
    row = logits(seed=5)
    best, second = row[0].argsort(descending=True)[:2].tolist()

    def drawn(words: tuple[tuple[int, ...], ...], output: tuple[int, ...], **params: object) -> int:
        item = sequence(output=output, temperature=0.0, bad_words=words, **params)
        return Draw(row.clone(), [item]).read()[0].token_id

    assert drawn(((best,),), ()) == second
    assert drawn(((6, 5, best),), (6, 5)) == second
    assert drawn(((6, 5, best),), (6, 4)) == best
    assert drawn(((5, best),), ()) == best, "nothing was generated yet"
    assert drawn(((2, best),), ()) == best, "the prompt ends with 2, but only what was generated counts"
    assert drawn(((best,),), (), allowed_token_ids=(best,)) == best, "what is allowed must hold, bad or not"


def test_named_tokens_are_scored_in_place_of_the_best() -> None:
    rows = logits(3, seed=6)
    expected = torch.log_softmax(rows, -1)
    items = [
        sequence(temperature=0.0, logprobs=2),
        sequence(temperature=0.0, logprobs=2, logprob_token_ids=(9, 4, 7)),
        sequence(temperature=0.0, logprobs=0, logprob_token_ids=(1,), allowed_token_ids=(2,)),
    ]
    first, named, limited = (token.logprobs for token in Draw(rows.clone(), items).read())
    assert first is not None and named is not None and limited is not None
    assert [i for i, _ in first.top] == rows[0].argsort(descending=True)[:2].tolist()
    assert [i for i, _ in named.top] == [9, 4, 7]
    assert [value for _, value in named.top] == pytest.approx(expected[1, [9, 4, 7]].tolist())
    assert limited.top[0] == (1, pytest.approx(float(expected[2, 1]))), "scores are of the raw logits"
    assert limited.logprob == pytest.approx(float(expected[2, 2]))
