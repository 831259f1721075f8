"""A decoder layer as prepared weights, and a stack of them run operation by operation.

Not where weights come from (`server.model.load`). Back ends that know a faster way than one operation after the other
have their own `run_layers`; this is the way of the others, and what `run_layers` means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm, Ops


@dataclass(slots=True)
class Layer:
    """One decoder layer; `Any` is what `Ops.prepare_*` returned."""

    input_norm: Norm
    qkv: Any
    q_norm: Norm | None
    k_norm: Norm | None
    o: Any
    post_norm: Norm
    gate_up: Any
    down: Any
    window: int | None  # tokens a query sees, itself included; None for all


def run_one_by_one(
    ops: Ops, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
    batch: AttentionBatch, scale: float,
) -> Tensor:  # fmt: skip
    """See Ops.run_layers."""
    for layer, kv in zip(layers, cache, strict=True):
        heads = HeadTransform(cos, sin, layer.q_norm, layer.k_norm)
        q = ops.attention_input(h, layer.input_norm, layer.qkv, heads, kv, batch.slots)
        h = ops.add_linear(h, ops.attention(q, kv, batch, scale, layer.window), layer.o)
        h = ops.add_linear(h, ops.mlp_input(h, layer.post_norm, layer.gate_up), layer.down)
    return h
