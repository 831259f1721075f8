"""A decoder layer as prepared weights, and its operations done the plain way, one by one.

Not where weights come from (`server.model.load`). Back ends that know a faster way than one operation after the other
have their own `run_layers`; this is the way of the others, and what `run_layers` means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


class PartOps(Protocol):
    """A back end that has the parts of `Ops.attention_input` as operations of their own."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        ...

    def qkv(self, x: Tensor, weight: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, HQ*D], k [T, HKV*D], v [T, HKV*D]."""
        ...

    def rotary_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """Rotate q [T, HQ, D] and k [T, HKV, D], write k and v to `slots` of the cache, return the rotated q."""
        ...


def attention_input_in_parts(
    ops: PartOps, h: Tensor, norm: Norm, weight: Any, heads: HeadTransform, kv: LayerKv, slots: Tensor
) -> Tensor:
    """See Ops.attention_input."""
    x = ops.rms_norm(h, norm.weight, norm.eps)
    q, k, v = (part.view(len(h), -1, kv.key.shape[-1]) for part in ops.qkv(x, weight))
    if heads.q_norm is not None:
        q = ops.rms_norm(q, heads.q_norm.weight, heads.q_norm.eps)
    if heads.k_norm is not None:
        k = ops.rms_norm(k, heads.k_norm.weight, heads.k_norm.eps)
    return ops.rotary_store(q, k, v, heads.cos, heads.sin, kv, slots)


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
