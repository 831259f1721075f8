"""How good a compressed model is, and how near it stays to its original, on held-out text.

Definitions, over the scored tokens of the windows of `evaluate`:
- top-1 agreement: share of positions where both models find the same token the most likely;
- KL: mean of KL(original || compressed) over the whole vocabulary, nats per token;
- semantic retention (the idea of arXiv 2505.07289, which takes benchmark scores): Sr_ppl = PPL of the original / PPL,
  Sr_top1 = top-1 agreement, Sr_kl = exp(-KL). 1 is the original; Sr_ppl may exceed it;
- theoretical and measured compression rates, TCr and MCr, are in `footprint`.

The composite joins retention and compression in one number. The paper's own exact expression is not public to us; this
is our reading of its description (square root of the sparsity, logarithm of the bits), under our name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spq.errors import OptionError
from spq.evaluate import Perplexity, perplexity_of
from spq.scoring import KeptLogits, LocalModel

COMPOSITE_NAME = "spq-composite (our reading)"
COMPOSITE_FORMULA = "Sr * (sqrt(s) + log2(16 / q) / 4) / 2, s: share of weights not stored, q: bits per stored weight"


@dataclass(frozen=True, slots=True)
class Quality:
    """One model on one text. What needs the original, or all logits, is None where they were not there."""

    perplexity: Perplexity
    base: Perplexity | None = None  # of the original, on the same windows
    top1: float | None = None
    kl: float | None = None
    by_window: tuple[float, ...] = ()  # negative log likelihood of each window, nats per scored token

    @property
    def sr_ppl(self) -> float | None:
        """Retention by perplexity."""
        return None if self.base is None else math.exp(self.base.nll - self.perplexity.nll)

    @property
    def sr_top1(self) -> float | None:
        """Retention by agreement."""
        return self.top1

    @property
    def sr_kl(self) -> float | None:
        """Retention by divergence."""
        return None if self.kl is None else math.exp(-self.kl)


def composite(retention: float, sparsity: float, bits: float) -> float:
    """COMPOSITE_FORMULA: `sparsity` 0..1, `bits` > 0; a model that grew counts as not compressed."""
    return retention * (math.sqrt(min(1.0, max(0.0, sparsity))) + max(0.0, math.log2(16.0 / bits)) / 4.0) / 2.0


@torch.inference_mode()
def predict(model: LocalModel | KeptLogits, windows: Tensor) -> tuple[float, Tensor]:
    """Summed negative log likelihood (nats) of windows [count, window], and the most likely next token after each
    token but the last, int64 [count, window - 1]."""
    nll = torch.zeros((), dtype=torch.float64)
    best = []
    for logits, targets in zip(model.logits(windows), model.targets(windows), strict=True):
        nll += _losses(logits, targets).sum()
        best.append(logits.argmax(-1).cpu())
    return float(nll), torch.cat(best).view(windows.shape[0], windows.shape[1] - 1)


def measure(model: LocalModel | KeptLogits, windows: Tensor, *, bos: bool = False) -> Quality:
    """Perplexity alone, on windows int64 [count, window]."""
    nll, _ = predict(model, windows)
    return Quality(perplexity_of(nll, windows, bos))


@torch.inference_mode()
def compare(model: LocalModel, original: LocalModel | KeptLogits, windows: Tensor, *, bos: bool = False) -> Quality:
    """All measures of `model` against `original`, both held at once, streamed over windows int64 [count, window].

    Raises OptionError where their vocabularies differ.
    """
    if model.spec.vocab_size != original.spec.vocab_size:
        raise OptionError(
            f"{model.folder} has {model.spec.vocab_size} tokens, the reference {original.folder} "
            f"{original.spec.vocab_size}: not the same model; give its own original"
        )
    base_nll, divergence, agreed = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    losses = []
    slices = zip(model.logits(windows), original.logits(windows), model.targets(windows), strict=True)
    for logits, base, targets in slices:
        losses.append(_losses(logits, targets))
        base_nll += _losses(base, targets).sum()
        agreed += (logits.argmax(-1) == base.argmax(-1)).sum().cpu()
        found, wanted = functional.log_softmax(logits, -1), functional.log_softmax(base, -1)
        divergence += functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).double().sum().cpu()
    by_window = torch.cat(losses).view(windows.shape[0], -1)
    nll = by_window.sum()
    base_perplexity = perplexity_of(float(base_nll), windows, bos)
    scored = base_perplexity.num_tokens
    return Quality(
        perplexity_of(float(nll), windows, bos),
        base_perplexity,
        float(agreed) / scored,
        max(float(divergence) / scored, 0.0),  # equal models can round to less than nothing
        tuple(by_window.mean(1).tolist()),
    )


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 [rows], so that a long text does not lose its small terms."""
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="none").double().cpu()
