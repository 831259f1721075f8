"""A model folder as a source of logits, given out a few positions at a time.

Logits of 2,048 tokens over a vocabulary of 128,000 are a gigabyte in float32; the head is therefore applied to slices
of the hidden states, and who measures adds up slice by slice. Not a server and not fast: transformers computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spq.architecture import ModelSpec
from spq.checkpoint import open_model
from spq.errors import ModelFileError

SLICE_BYTES = 16 << 20  # of float32 logits at a time
BATCH_TOKENS = 4096  # of windows run together


class LocalModel:
    """A plain or packed folder loaded through transformers, computing in `dtype` on `device`."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Load. Raises SpqError as `open_model`, and ModelFileError where transformers cannot load it."""
        checkpoint = open_model(folder)
        self.spec: ModelSpec = checkpoint.spec
        checkpoint.close()
        self.folder = folder
        self.device = device
        self._rows = max(1, SLICE_BYTES // (4 * self.spec.vocab_size))
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            self.module = model.to(device=device).eval()  # not to dtype: scales stay float32
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelFileError(f"{folder}: cannot be loaded on {device} as {dtype}: {reason}") from error

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Slices float32 [rows, vocab] of what follows each token but the last of windows int64 [count, window].

        Rows come window by window. Two models of one vocabulary give slices of the same rows.
        """
        for batch in batches(windows):
            for part in torch.split(self._hidden(batch), self._rows):
                yield _apply(self.module.lm_head, part)

    def targets(self, windows: Tensor) -> Iterator[Tensor]:
        """The tokens int64 [rows] that the slices of `logits` predict."""
        return _targets(windows, self._rows)

    @torch.inference_mode()
    def _hidden(self, batch: Tensor) -> Tensor:
        """Last hidden states [count * (window - 1), hidden] of all tokens but each window's last."""
        hidden: Tensor = self.module.model(batch.to(self.device), use_cache=False).last_hidden_state
        return hidden[:, :-1].flatten(0, 1)


class KeptLogits:
    """What a model says on some windows, without its layers: its last hidden states there, and its head."""

    def __init__(self, model: LocalModel, windows: Tensor) -> None:
        """Run `model`, whose layers may go afterwards. `windows` int64 [count, window]."""
        self.spec, self.folder = model.spec, model.folder
        self._head, self._device, self._rows = model.module.lm_head, model.device, model._rows
        self._hidden = [model._hidden(batch).cpu() for batch in batches(windows)]

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """As LocalModel, on the same windows."""
        for hidden in self._hidden:
            for part in torch.split(hidden, self._rows):
                yield _apply(self._head, part.to(self._device))

    def targets(self, windows: Tensor) -> Iterator[Tensor]:
        """As LocalModel."""
        return _targets(windows, self._rows)


@torch.inference_mode()
def _apply(head: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    return logits.float()


def _targets(windows: Tensor, rows: int) -> Iterator[Tensor]:
    for batch in batches(windows):
        yield from torch.split(batch[:, 1:].flatten(), rows)


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Windows [count, window] in groups that run together, of at most BATCH_TOKENS tokens where one is not longer."""
    return torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1]))
