"""Every operation in the plainest torch: the definition of correct, in whatever dtype it is given.

Not fast and not meant to be: tests hold the other back ends to it, in float64 where they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layers import Layer, attention_input_in_parts, run_one_by_one
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight


class ReferenceOps:
    """Keeps weights as they were stored and dequantizes at each use. `dtype` may be float64.

    With `int8_prefill_above` layers round the inputs of int8 matrices to int8 in steps of more rows than that: what
    the W8A8 mode of `kernels.gpu.int8_prefill` computes.
    """

    name = "reference"

    def __init__(self, device: torch.device, dtype: torch.dtype, int8_prefill_above: int | None = None) -> None:
        self.device = device
        self._int8_prefill_above = int8_prefill_above
        self.dtype = dtype

    def use_threads(self, count: int) -> None:
        """Let `count` CPU threads work from now on: torch's own."""
        torch.set_num_threads(count)

    def prepare_linear(self, weight: LinearWeight) -> LinearWeight:
        """The weight itself, on the device."""
        moved: LinearWeight = _to(weight, self.device)
        return moved

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> tuple[LinearWeight, ...]:
        """The three weights."""
        check_same_input(q, k, v)
        return tuple(self.prepare_linear(w) for w in (q, k, v))

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> tuple[LinearWeight, ...]:
        """The two weights."""
        check_same_input(gate, up)
        return self.prepare_linear(gate), self.prepare_linear(up)

    def prepare_embedding(self, weight: Leaf, tied_head: bool = False) -> Leaf:
        """The table itself, on the device."""
        moved: Leaf = _to(weight, self.device)
        return moved

    def nbytes(self, prepared: Any) -> int:
        """Bytes of the stored tensors."""
        return sum(w.nbytes for w in prepared) if isinstance(prepared, tuple) else prepared.nbytes

    def embed(self, token_ids: Tensor, table: Leaf) -> Tensor:
        """token_ids [T] -> [T, hidden]."""
        if isinstance(table, Int4Weight):
            return table.rows(token_ids).dequantize().to(self.dtype)
        if isinstance(table, Int8Weight):
            return table.qweight[token_ids].to(self.dtype) * table.scale[token_ids, None].to(self.dtype)
        return table.weight[token_ids].to(self.dtype)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [T, in] -> [T, out]."""
        if isinstance(weight, CorrectedWeight):
            return self.linear(x, weight.main) + self.linear(x, weight.correction)
        if isinstance(weight, LowRankWeight):
            return self.linear(self.linear(x, weight.down), weight.up)
        if isinstance(weight, Int8Weight):
            y = F.linear(x, weight.qweight.to(x.dtype)) * weight.scale.to(x.dtype)
        elif isinstance(weight, Int4Weight):
            y = F.linear(x, weight.dequantize().to(x.dtype))
        else:
            y = F.linear(x, weight.weight.to(x.dtype))
        return y if weight.bias is None else y + weight.bias.to(x.dtype)

    def _layer_linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        if self._int8_prefill_above is None or len(x) <= self._int8_prefill_above:
            return self.linear(x, weight)
        if isinstance(weight, CorrectedWeight):
            return self._layer_linear(x, weight.main) + self.linear(x, weight.correction)
        if isinstance(weight, LowRankWeight) and isinstance(weight.down, Int8Weight):
            return self._layer_linear(self._layer_linear(x, weight.down), weight.up)
        return self.linear(int8_rows(x) if isinstance(weight, Int8Weight) else x, weight)

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab]."""
        return self.linear(x, weight).float()

    def qkv(self, x: Tensor, weight: tuple[LinearWeight, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q, k, v."""
        q, k, v = (self._layer_linear(x, w) for w in weight)
        return q, k, v

    def gate_up_silu(self, x: Tensor, weight: tuple[LinearWeight, ...]) -> Tensor:
        """x [T, hidden] -> [T, width]."""
        gate, up = (self._layer_linear(x, w) for w in weight)
        return F.silu(gate) * up

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As transformers' LlamaRMSNorm: statistics in float32 (or wider), then cast, then weight."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight.to(x.dtype) * normed.to(x.dtype)

    def run_layers(
        self, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
        batch: AttentionBatch, scale: float,
    ) -> Tensor:  # fmt: skip
        """One after the other."""
        return run_one_by_one(self, h, layers, cos, sin, cache, batch, scale)

    def attention_input(
        self, h: Tensor, norm: Norm, weight: tuple[LinearWeight, ...], heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops."""
        return attention_input_in_parts(self, h, norm, weight, heads, kv, slots)

    def add_linear(self, h: Tensor, x: Tensor, weight: LinearWeight) -> Tensor:
        """See Ops."""
        return h + self._layer_linear(x, weight)

    def mlp_input(self, h: Tensor, norm: Norm, weight: tuple[LinearWeight, ...]) -> Tensor:
        """See Ops."""
        return self.gate_up_silu(self.rms_norm(h, norm.weight, norm.eps), weight)

    def rotary_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """Rotate q and k, write k and v to the cache, return q."""
        store(rotate(k, cos, sin), kv.key, kv.key_scale, slots)
        store(v, kv.value, kv.value_scale, slots)
        return rotate(q, cos, sin)

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """Per sequence: gather its keys and values, mask, softmax, weigh."""
        out = torch.empty_like(q)
        group = q.shape[1] // kv.key.shape[1]
        for s, context in enumerate(batch.context_lens_host):
            begin, end = batch.query_starts_host[s], batch.query_starts_host[s + 1]
            slots = sequence_slots(batch, s, context)
            keys = gather(kv.key, kv.key_scale, slots, q.dtype).repeat_interleave(group, 1)  # [L, HQ, D]
            values = gather(kv.value, kv.value_scale, slots, q.dtype).repeat_interleave(group, 1)
            scores = torch.einsum("thd,lhd->htl", q[begin:end], keys) * scale
            visible = causal_mask(end - begin, context, window, q.device)
            probs = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
            out[begin:end] = torch.einsum("htl,lhd->thd", probs, values)
        return out.flatten(1)


def check_same_input(*weights: LinearWeight) -> None:
    """Raises ValueError unless all weights take the same number of inputs."""
    widths = {w.shape[1] for w in weights}
    if len(widths) != 1:
        raise ValueError(f"projections of one input differ in input width: {sorted(widths)}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, D] by cos/sin [T, D/2] (Su et al. 2021, eq. 34; half-split pairs)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def store(x: Tensor, cache: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Write x [T, HKV, D] to `slots`; an int8 cache gets absmax/127 scales per token and head."""
    if scale is None:
        cache[slots] = x.to(cache.dtype)
        return
    step = (x.float().abs().amax(-1) / 127).clamp_min(1e-12)
    scale[slots] = step
    cache[slots] = (x.float() / step[..., None]).round().clamp(-127, 127).to(torch.int8)


def int8_rows(x: Tensor) -> Tensor:
    """x [..., n] rounded to multiples of absmax / 127 of each row: int8 with one scale per token."""
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / step).round() * step


def gather(cache: Tensor, scale: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[L, HKV, D] of one sequence, dequantized."""
    rows = cache[slots].to(dtype)
    return rows if scale is None else rows * scale[slots, :, None].to(dtype)


def sequence_slots(batch: AttentionBatch, sequence: int, length: int) -> Tensor:
    """int64 [length]: the cache slots of one sequence's tokens in order."""
    size = batch.block_size
    pages = batch.block_tables[sequence, : -(-length // size)].long()
    return (pages[:, None] * size + torch.arange(size, device=pages.device)).flatten()[:length]


def causal_mask(num_queries: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, context]: True where the query may look; the queries are the last of the context."""
    rows = torch.arange(context - num_queries, context, device=device)[:, None]
    columns = torch.arange(context, device=device)[None, :]
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)


def _to(weight: Any, device: torch.device) -> Any:
    if isinstance(weight, LowRankWeight):
        return LowRankWeight(_to(weight.down, device), _to(weight.up, device))
    if isinstance(weight, CorrectedWeight):
        return CorrectedWeight(_to(weight.main, device), _to(weight.correction, device))
    bias = None if weight.bias is None else weight.bias.to(device)
    if isinstance(weight, Int4Weight):
        zero = None if weight.zero is None else weight.zero.to(device)
        return Int4Weight(
            weight.qweight.to(device), weight.scale.to(device), zero, weight.group, weight.in_features, bias
        )
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.qweight.to(device), weight.scale.to(device), bias)
    return DenseWeight(weight.weight.to(device), bias)
