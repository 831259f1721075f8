"""The operations of a LLaMA on CPUs, fast enough to serve: int8 and int4 matrices stay so, activations are
float32.

Not the definition of correct (`reference`), nor matrices (`cpu_linear`), integer products (`cpu_engines`) or attention
(`cpu_attention`). Everything except the int8 product is plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu_attention import paged_attention
from kernels.cpu_engines import machine_choice
from kernels.cpu_linear import FloatMatrix, Joint, Matrix, WidenedInt4Matrix, WidenedMatrix, join, lay_out
from kernels.layers import Layer, attention_input_in_parts, run_one_by_one
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.reference import check_same_input
from kernels.weights import DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight


@dataclass(slots=True)
class Table:
    """Embedding rows as stored, and the matrix for logits where the head is tied to them."""

    rows: Leaf  # [vocab, hidden]
    head: Matrix | None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, their scales and the head's own copy (none where it uses the rows themselves)."""
        own, head, rows = self.rows.nbytes, self.head, self.rows
        if head is None:
            return own
        shared = (
            (isinstance(head, FloatMatrix) and isinstance(rows, DenseWeight) and head.weight is rows.weight)
            or (isinstance(head, WidenedMatrix) and isinstance(rows, Int8Weight) and head.qweight is rows.qweight)
            or (isinstance(head, WidenedInt4Matrix) and isinstance(rows, Int4Weight))
        )
        return own if shared else own + head.nbytes


class CpuOps:
    """See kernels.ops.Ops. Raises ValueError for a device that is not a CPU or activations other than float32.

    `linear_method` names what multiplies int8 weights (small ones are widened in any case), `linear_reason` why: the
    outcome of the self-test. An int8 product of a row does not depend on the other rows, bit for bit, where the matrix
    is packed: not the small ones, and none where the method is "widened".
    """

    name = "cpu"

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' on device {device}: name a CPU device, or backend 'triton' for CUDA")
        if dtype != torch.float32:
            raise ValueError(f"dtype {dtype} on a CPU: only float32 is supported; set dtype to float32 or auto")
        self.device = device
        self.dtype = dtype
        choice = machine_choice()
        self._engines = choice.engines
        self.linear_method = choice.engines[0].name if choice.engines else "widened"
        self.linear_reason = choice.reason

    def use_threads(self, count: int) -> None:
        """Let `count` CPU threads work from now on: torch's own."""
        torch.set_num_threads(count)

    def prepare_linear(self, weight: LinearWeight) -> Joint:
        """Pack one matrix (or pair). Drop the caller's tensors afterwards: what a digit engine packed is a copy."""
        return join([weight], self._lay_out)

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> Joint:
        """Pack three projections of one input. Raises ValueError when their input widths differ."""
        check_same_input(q, k, v)
        return join([q, k, v], self._lay_out)

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> Joint:
        """Pack two projections of one input. Raises ValueError when their shapes differ."""
        check_gate_up(gate, up)
        return join([gate, up], self._lay_out)

    def prepare_embedding(self, weight: Leaf, tied_head: bool = False) -> Table:
        """Keep the rows; with `tied_head` also pack them as a matrix (a second copy unless the rows serve as they
        are: float32, or integers that are widened at each use)."""
        return Table(weight, self._lay_out([weight]) if tied_head else None)

    def nbytes(self, prepared: Joint | Table) -> int:
        """Bytes resident, packing included (an upper bound for AVX512 packing)."""
        return prepared.nbytes

    def embed(self, token_ids: Tensor, table: Table) -> Tensor:
        """token_ids int64 [T] -> float32 [T, hidden]."""
        rows = table.rows
        if isinstance(rows, Int4Weight):
            return rows.rows(token_ids).dequantize()
        if isinstance(rows, Int8Weight):
            scale = rows.scale.index_select(0, token_ids).float()
            return rows.qweight.index_select(0, token_ids).float().mul_(scale[:, None])
        return rows.weight.index_select(0, token_ids).float()

    def linear(self, x: Tensor, weight: Joint) -> Tensor:
        """x [T, in] -> [T, out]."""
        return weight.apply(x)[0]

    def logits(self, x: Tensor, weight: Joint | Table) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab]. Raises ValueError for a table prepared without `tied_head`."""
        if isinstance(weight, Joint):
            return weight.apply(x)[0]
        if weight.head is None:
            raise ValueError("this embedding has no head: prepare it with tied_head=True")
        return weight.head.multiply(x)

    def qkv(self, x: Tensor, weight: Joint) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> contiguous q, k, v."""
        q, k, v = weight.apply(x)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def gate_up_silu(self, x: Tensor, weight: Joint) -> Tensor:
        """x [T, hidden] -> [T, width]."""
        gate, up = weight.apply(x)
        return F.silu(gate).mul_(up)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n] float32 -> the same shape."""
        return rms_norm(x, weight, eps)

    def run_layers(
        self, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
        batch: AttentionBatch, scale: float,
    ) -> Tensor:  # fmt: skip
        """One after the other."""
        return run_one_by_one(self, h, layers, cos, sin, cache, batch, scale)

    def attention_input(
        self, h: Tensor, norm: Norm, weight: Joint, heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops."""
        return attention_input_in_parts(self, h, norm, weight, heads, kv, slots)

    def add_linear(self, h: Tensor, x: Tensor, weight: Joint) -> Tensor:
        """See Ops; overwrites `h`."""
        return h.add_(self.linear(x, weight))

    def mlp_input(self, h: Tensor, norm: Norm, weight: Joint) -> Tensor:
        """See Ops."""
        return self.gate_up_silu(self.rms_norm(h, norm.weight, norm.eps), weight)

    def rotary_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops; `q` and `k` are left as they were."""
        cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]  # [T, 1, D]
        _store(_rotate(k, cos, sin), kv.key, kv.key_scale, slots)
        _store(v, kv.value, kv.value_scale, slots)
        return _rotate(q, cos, sin)

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """See Ops."""
        return paged_attention(q, kv, batch, scale, window)

    def _lay_out(self, leaves: list[Leaf]) -> Matrix:
        return lay_out(leaves, self._engines)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / rms(x) * weight [n] in float32, into new memory."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return (x * scale).mul_(weight)


def check_gate_up(gate: LinearWeight, up: LinearWeight) -> None:
    """Raises ValueError unless both have the same inputs and the same number of outputs."""
    check_same_input(gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"gate_proj has {gate.shape[0]} outputs, up_proj {up.shape[0]}: they must be equal")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] into new memory; cos and sin [T, 1, D], sin negative in its first half (half-split pairs)."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return (x * cos).addcmul_(swapped, sin)


def _store(x: Tensor, cache: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Write x [T, HKV, D] to `slots`; int8 caches get absmax/127 scales per token and head, as in `reference`."""
    if scale is not None:
        step = x.abs().amax(-1).div_(127).clamp_min_(1e-12)  # [T, HKV]
        scale.index_copy_(0, slots, step)
        x = (x / step[..., None]).round_().clamp_(-127, 127)
    cache.index_copy_(0, slots, x.to(cache.dtype))
