"""A budgeted model beside its original, on windows of the calibration text that nothing was fitted to.

Not an evaluation on held-out text (`judge`): it says how good the allocator's prediction was, and which of its choices
came out best. In float32 on a CPU, in the source's dtype on a GPU, where 7B in float32 would not fit 24 GB.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spq.allocator import release_freed
from spq.errors import ModelFileError
from spq.quality import compare, measure
from spq.report import PredictionReport
from spq.scoring import KeptLogits, LocalModel

WEAK = 0.05  # a prediction further off than this share of the perplexity is called weak


@dataclass(slots=True)
class Verifier:
    """What the original says on the windows int64 [count, len]; its layers are gone."""

    windows: Tensor
    device: torch.device
    dtype: torch.dtype
    original: KeptLogits
    base: float  # its perplexity

    @classmethod
    def of(cls, folder: Path, windows: Tensor, device: torch.device, stored: torch.dtype) -> Verifier:
        """Run the model of a plain folder, `stored` its dtype. Raises ModelFileError where it cannot be loaded."""
        dtype = torch.float32 if device.type == "cpu" else stored
        original = KeptLogits(LocalModel(folder, device, dtype), windows)
        _release()
        return cls(windows, device, dtype, original, measure(original, windows).perplexity.value)

    def check(self, folder: Path, rise: float, trained: bool = False) -> PredictionReport:
        """A packed folder, expected to lose `rise` nats per token; a prediction knows nothing of training, and is then
        weak only where it promised too much. Raises ModelFileError for a folder whose answers are no numbers."""
        quality = compare(LocalModel(folder, self.device, self.dtype), self.original, self.windows)
        _release()
        found, predicted = quality.perplexity, self.base * math.exp(rise)
        if quality.kl is None or not math.isfinite(found.value):
            raise ModelFileError(f"{folder}: its answers are not finite after compression; report this model")
        off = predicted / found.value - 1
        return PredictionReport(
            rise=rise,
            base=self.base,
            predicted=predicted,
            measured=found.value,
            kl=quality.kl,
            num_tokens=found.num_tokens,
            weak=off < -WEAK or (off > WEAK and not trained),
        )


def _release() -> None:
    """What a model took, before the next thing is made: transformers leaves cycles."""
    gc.collect()
    release_freed()
