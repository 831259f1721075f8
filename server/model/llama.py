"""The LLaMA family (LLaMA, Mistral, Qwen2, Qwen3) over `kernels.ops`, with a paged cache and ragged batches.

Not a torch module: weights are prepared by the back end and there is nothing to train. The families differ by
attention biases (in the weights), a norm over query and key heads (Qwen3) and sliding windows (Mistral, Qwen);
each layer may have its own MLP width and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.ops import AttentionBatch, LayerKv, Ops
from server.model.rope import RotaryTable
from spq.architecture import ModelSpec


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; `Any` is what `Ops.prepare_*` returned."""

    input_norm: Tensor  # [hidden]
    qkv: Any
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: Any
    post_norm: Tensor  # [hidden]
    gate_up: Any
    down: Any


@dataclass(slots=True)
class ModelWeights:
    """All of a model."""

    embedding: Any
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
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
        """token_ids, positions int64 [T]; lengths as `RotaryTable.cos_sin` wants -> final hidden [T, hidden]."""
        ops, spec, weights = self.ops, self.spec, self._weights
        cos, sin = self.rope.cos_sin(positions, lengths)
        residual = ops.embed(token_ids, weights.embedding)  # [T, hidden]
        x = ops.rms_norm(residual, weights.layers[0].input_norm, spec.norm_eps)
        for i, layer in enumerate(weights.layers):
            q, k, v = (part.view(len(positions), -1, spec.head_dim) for part in ops.qkv(x, layer.qkv))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = ops.rms_norm(q, layer.q_norm, spec.norm_eps), ops.rms_norm(k, layer.k_norm, spec.norm_eps)
            q = ops.rotary_store(q, k, v, cos, sin, cache[i], batch.slots)
            x = ops.linear(ops.attention(q, cache[i], batch, self._scale, spec.windows[i]), layer.o)
            x, residual = ops.add_rms_norm(x, residual, layer.post_norm, spec.norm_eps)
            x = ops.linear(ops.gate_up_silu(x, layer.gate_up), layer.down)
            last = i + 1 == len(weights.layers)
            norm = weights.norm if last else weights.layers[i + 1].input_norm
            x, residual = ops.add_rms_norm(x, residual, norm, spec.norm_eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> float32 [R, vocab]."""
        return self.ops.logits(hidden, self._weights.head)
