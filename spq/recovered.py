"""A trained model as the source of the last pass: its matrices with updates added, its tables and norms untouched.

Not the training (`recover`). Tables and norms are read from the original checkpoint, so they cannot have changed. Sums
are made in float32 as each layer is read; the trained model is never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights import DenseWeight, Leaf, LinearWeight, LowRankWeight
from spq.apply import Factors
from spq.architecture import MLP
from spq.checkpoint import Checkpoint
from spq.layout import layer_linears, layer_vectors
from spq.pipeline import as_float_layer
from spq.recipe import Decision
from spq.recover import Update
from spq.source import Source


@dataclass(slots=True)
class Recovered(Source):
    """Shapes are those of the original: neurons that were dropped are zero."""

    pruned: Checkpoint  # the float model that was trained
    updates: dict[str, Update]  # by the name of matrix or factor
    decision: Decision  # that `pruned` was made by

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """See Source; biases that pruning added are there too."""
        spec = self.spec
        prefix = f"{spec.layer_prefix(layer)}."
        state = {
            name.removeprefix(prefix): self.read(name).to(self.device, torch.float32)
            for name in layer_vectors(spec, layer)
        }
        kept = self.decision.kept(layer, spec.intermediate_size)
        for module, shape in layer_linears(spec, layer).items():
            inside, local = module.removeprefix(prefix), module.rpartition(".")[2]
            found = as_float_layer(inside, self._linear(module), shape, kept if local in MLP else None)
            state |= {name: value.to(self.device) for name, value in found.items()}
        return state

    def bias(self, module: str) -> Tensor | None:
        """See Source. Training leaves biases alone; only pruning may have changed one, that of down_proj."""
        return self.pruned.linear(module).bias if module.endswith("down_proj") else Source.bias(self, module)

    def factors(self, module: str) -> Factors:
        """The pair of a matrix that has one, on the device."""
        pair = self._linear(module)
        assert isinstance(pair, LowRankWeight)
        return pair.down.dequantize().to(self.device), pair.up.dequantize().to(self.device)

    def _linear(self, module: str) -> LinearWeight:
        stored = self.pruned.linear(module)
        if isinstance(stored, LowRankWeight):
            return LowRankWeight(self._sum(f"{module}.down", stored.down), self._sum(f"{module}.up", stored.up))
        assert isinstance(stored, DenseWeight)
        return self._sum(module, stored)

    def _sum(self, name: str, leaf: Leaf) -> DenseWeight:
        down, up = self.updates[name]
        return DenseWeight(leaf.dequantize() + up @ down, leaf.bias)
