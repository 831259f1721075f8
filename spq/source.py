"""The float checkpoint as the passes of a compression read it: tensor by tensor, each checked to be finite.

Not the opening of the folder (`checkpoint`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spq.architecture import ModelSpec
from spq.checkpoint import Checkpoint
from spq.errors import ModelFileError
from spq.layout import EMBEDDING, layer_linears, layer_vectors
from spq.quantize import CHUNK_ELEMENTS
from spq.tensorfile import DTYPES, read_rows, read_tensor


@dataclass(slots=True)
class Source:
    """Reads one checkpoint; everything `device` says is moved there."""

    folder: Path
    checkpoint: Checkpoint
    device: torch.device

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.checkpoint.spec

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or some of its rows, as stored, on the CPU. Raises ModelFileError where a value is not finite."""
        info = self.checkpoint.tensors[name]
        tensor = read_tensor(info) if rows is None else read_rows(info, *rows)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{info.path}: {name} holds NaN or infinite values; download the model again")
        return tensor

    def weight(self, module: str) -> Tensor:
        """A matrix float32 [out, in] on the device."""
        return self.read(f"{module}.weight").to(self.device, torch.float32)

    def bias(self, module: str) -> Tensor | None:
        """Its bias as stored, on the CPU."""
        name = f"{module}.bias"
        return self.read(name) if name in self.checkpoint.tensors else None

    def itemsize(self, module: str) -> int:
        """Bytes of a stored element of a matrix."""
        return DTYPES[self.checkpoint.tensors[f"{module}.weight"].dtype].itemsize

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """All tensors of a layer by their names inside it, float32 on the device."""
        prefix = f"{self.spec.layer_prefix(layer)}."
        names = list(layer_vectors(self.spec, layer))
        for module in layer_linears(self.spec, layer):
            parts = (f"{module}.{part}" for part in ("weight", "bias"))
            names += [name for name in parts if name in self.checkpoint.tensors]
        return {name.removeprefix(prefix): self.read(name).to(self.device, torch.float32) for name in names}

    def embed(self, windows: Tensor) -> Tensor:
        """Embedding rows of windows int64 [count, len] -> float32 [count, len, hidden] on the CPU.

        Raises ModelFileError where the tokenizer makes tokens that the table does not have.
        """
        info = self.checkpoint.tensors[f"{EMBEDDING}.weight"]
        top = int(windows.max())
        if top >= info.shape[0]:
            raise ModelFileError(
                f"{info.path.parent}: its tokenizer makes token {top}, but the embedding has {info.shape[0]} rows"
            )
        hidden = torch.empty((*windows.shape, info.shape[1]), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // info.shape[1])
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            inside = (windows >= start) & (windows < stop)
            hidden[inside] = self.read(info.name, (start, stop))[windows[inside] - start].float()
        return hidden
