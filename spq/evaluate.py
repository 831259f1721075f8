"""Perplexity, by one stated protocol, of anything that turns token ids into logits.

Protocol: the whole text is tokenized without special tokens and cut into non-overlapping windows of full length (the
rest is dropped); negative log likelihoods are averaged over all scored tokens. Without BOS a window's first token is
context only; with BOS each window is BOS + (window - 1) text tokens, all of which are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from spq.calibrate import tokenize
from spq.checkpoint import open_model
from spq.errors import CalibrationError

DEFAULT_WINDOW = 2048
BATCH_TOKENS = 4096
MAX_NLL = 700.0  # beyond, exp leaves float64


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measured perplexity with what it takes to repeat it."""

    value: float
    nll: float  # mean negative log likelihood, nats per scored token
    num_tokens: int  # scored
    num_windows: int
    window: int  # tokens per window, BOS included
    bos: bool  # whether each window begins with BOS

    @property
    def protocol(self) -> str:
        """The protocol in words."""
        bos = "each begun with BOS" if self.bos else "no BOS, the first token of each not scored"
        return f"{self.num_windows} non-overlapping windows of {self.window} tokens, {bos}; {self.num_tokens} scored"


def cut_windows(ids: Tensor, window: int, *, bos_id: int | None = None, max_tokens: int | None = None) -> Tensor:
    """The windows of a text ids int64 [n] -> int64 [count, window], BOS first where given.

    Only the first `max_tokens` text tokens are used where given. Raises CalibrationError for a text shorter than one
    window.
    """
    if window < 2:
        raise CalibrationError(f"a perplexity window of {window} tokens scores nothing; give at least 2")
    text_len = window if bos_id is None else window - 1
    if max_tokens is not None:
        ids = ids[:max_tokens]
    count = ids.numel() // text_len
    if count == 0:
        raise CalibrationError(
            f"evaluation text has {ids.numel()} tokens, shorter than one window of {text_len}; give a longer text or "
            "a smaller window"
        )
    windows = ids[: count * text_len].view(count, text_len)
    if bos_id is not None:
        windows = torch.cat([torch.full((count, 1), bos_id, dtype=windows.dtype), windows], dim=1)
    return windows


@torch.inference_mode()
def perplexity(
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    window: int,
    *,
    bos_id: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Perplexity:
    """Perplexity of `logits`: ids int64 [B, window] -> float [B, window, vocab], on text ids int64 [n].

    Raises CalibrationError as `cut_windows`.
    """
    windows = cut_windows(ids, window, bos_id=bos_id, max_tokens=max_tokens)
    total, step = 0.0, max(1, batch_tokens // window)
    for batch in torch.split(windows, step):
        scores = logits(batch)[:, :-1].float()
        targets = batch[:, 1:].to(scores.device)
        loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
        total += float(loss)
    return perplexity_of(total, windows, bos_id is not None)


def perplexity_of(total_nll: float, windows: Tensor, bos: bool) -> Perplexity:
    """The result for the summed negative log likelihood (nats) of all scored tokens of windows [count, window]."""
    count, window = windows.shape
    scored = count * (window - 1)
    nll = total_nll / scored
    return Perplexity(math.inf if nll > MAX_NLL else math.exp(nll), nll, scored, count, window, bos)


def choose_window(window: int | None, context: int) -> int:
    """Tokens per window: as asked for, else the context, at most 2,048. Raises CalibrationError beyond the context."""
    length = min(context, DEFAULT_WINDOW) if window is None else window
    if length > context:
        raise CalibrationError(f"window of {length} tokens, but the model's context is {context}; lower it")
    return length


def evaluate_folder(
    folder: Path,
    text: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    stored_dtype: torch.dtype | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    use_bos: bool = False,
) -> Perplexity:
    """Perplexity of a plain or packed folder through transformers, computed in `dtype`.

    `stored_dtype` rounds the weights first, e.g. float16 to judge a float32 checkpoint as it would be shipped.
    `window` defaults to the model's context, at most 2,048. Raises SpqError as `open_model` and `perplexity`.
    """
    checkpoint = open_model(folder)
    spec = checkpoint.spec
    checkpoint.close()
    length = choose_window(window, spec.max_positions)
    bos_id = spec.config.bos_token_id if use_bos else None
    if use_bos and not isinstance(bos_id, int):
        raise CalibrationError(f"{folder}: config.json names no single bos_token_id ({bos_id!r}); evaluate without BOS")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=stored_dtype or dtype, local_files_only=True)
    model = model.to(device=device, dtype=dtype).eval()
    ids = tokenize(folder, text)
    return perplexity(
        lambda batch: model(batch.to(device), use_cache=False).logits,
        ids,
        length,
        bos_id=bos_id,
        max_tokens=max_tokens,
    )
