"""The LLaMA family (LLaMA, Mistral, Qwen2, Qwen3) over `kernels.ops`, with a paged cache and ragged batches.

Not a torch module: weights are prepared by the back end and there is nothing to train. The families differ by
attention biases (in the weights), a norm over query and key heads (Qwen3) and sliding windows (Mistral, Qwen);
each layer may have its own MLP width and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.layers import Layer
from kernels.ops import AttentionBatch, LayerKv, Norm, Ops
from server.model.coded import CodedLayers
from server.model.rope import RotaryTable
from spq.architecture import ModelSpec


@dataclass(slots=True)
class ModelWeights:
    """All of a model."""

    embedding: Any
    layers: list[Layer] | CodedLayers
    norm: Norm
    head: Any  # the embedding's table where tied


class Llama:
    """Forward pass of one step. Shapes: T tokens over all sequences of the step."""

    def __init__(self, spec: ModelSpec, ops: Ops, weights: ModelWeights, rope: RotaryTable) -> None:
        self.spec = spec
        self.ops = ops
        self.rope = rope
        self._weights = weights
        self._scale = spec.head_dim**-0.5

    def forward(
        self, token_ids: Tensor, positions: Tensor, lengths: list[int], batch: AttentionBatch, cache: list[LayerKv]
    ) -> Tensor:
        """token_ids, positions int64 [T]; lengths as `RotaryTable.cos_sin` wants -> residual stream [T, hidden] after
        the last layer, before the last norm."""
        ops = self.ops
        cos, sin = self.rope.cos_sin(positions, lengths)
        h = ops.embed(token_ids, self._weights.embedding)
        layers = self._weights.layers
        if isinstance(layers, CodedLayers):
            return layers.run(h, cos, sin, cache, batch, self._scale)
        return ops.run_layers(h, layers, cos, sin, cache, batch, self._scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] as `forward` returns it -> float32 [R, vocab]."""
        return self.ops.logits(self.states(hidden), self._weights.head)

    def states(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] as `forward` returns it -> the same after the last norm: the last hidden states."""
        norm = self._weights.norm
        return self.ops.rms_norm(hidden, norm.weight, norm.eps)
