"""The operations of `kernels.ops` on a CUDA device: Triton kernels for int8, cuBLAS for float matrices.

Nothing here waits for the device or reads from it, so that a whole step can be captured in a CUDA graph. Under
TRITON_INTERPRET=1 the same code runs on CPU tensors, slowly: that is how it is tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.embedding import embedding
from kernels.gpu.gate_up import gate_up_silu, silu_mul
from kernels.gpu.int8_linear import int8_linear_kernel
from kernels.gpu.layout import DenseMatrix, Int8Matrices, dense_matrix, int8_matrices
from kernels.gpu.low_rank import Int8Group, grouped_linear, int8_group, is_int8
from kernels.gpu.norm import add_rms_norm, rms_norm
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.rotary_store import rotary_store
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.weights import DenseWeight, Int8Weight, LinearWeight, LowRankWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(slots=True)
class MixedPair:
    """A low-rank pair of which at least one factor is float: two products one after the other."""

    first: DenseMatrix | Int8Group
    second: DenseMatrix | Int8Group

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.first.nbytes + self.second.nbytes


Linear = DenseMatrix | Int8Group | MixedPair


@dataclass(slots=True)
class Projections:
    """q, k, v: those that are int8 share launches, the others go one by one."""

    grouped: Int8Group | None
    single: tuple[Linear | None, ...]  # None where the projection is in the group

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        total = 0 if self.grouped is None else self.grouped.nbytes
        return total + sum(linear.nbytes for linear in self.single if linear is not None)


@dataclass(slots=True)
class FusedGateUp:
    """Both int8 matrices of the MLP input, for one launch."""

    matrices: Int8Matrices
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.matrices.nbytes


class TritonOps:
    """`Ops` for float16 and bfloat16 activations; float32 for checks (slow, exact products)."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError for another dtype, RuntimeError where the kernels cannot run on the device."""
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype} is none of float16, bfloat16, float32")
        interpreted = not isinstance(int8_linear_kernel, JITFunction)
        if device.type == "cuda" and interpreted:
            raise RuntimeError("TRITON_INTERPRET is set: kernels would run in the interpreter; unset it for a GPU")
        if device.type == "cuda" and device.index not in (None, 0):
            raise RuntimeError(f"device {device} is not the first one; choose a GPU with CUDA_VISIBLE_DEVICES")
        if device.type != "cuda" and not (device.type == "cpu" and interpreted):
            raise RuntimeError(f"device {device} cannot run Triton kernels; a CUDA device is needed")
        self.device = device
        self.dtype = dtype
        self._magic = dtype == torch.float16  # see primitives.dequantize

    def prepare_linear(self, weight: LinearWeight) -> Linear:
        """Lay out one matrix. Raises ValueError when shapes disagree."""
        if is_int8(weight):
            return int8_group([weight], self.device, self._magic)
        if isinstance(weight, LowRankWeight):
            if weight.up.shape[1] != weight.rank:
                raise ValueError(f"factors {weight.up.shape} and {weight.down.shape} disagree in rank")
            return MixedPair(self._factor(weight.down), self._factor(weight.up))
        return self._factor(weight)

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> Projections:
        """Lay out the three projections; the int8 ones among them share launches."""
        _check_same_input(q, k, v)
        together = [w for w in (q, k, v) if is_int8(w)]
        grouped = int8_group(together, self.device, self._magic) if together else None
        return Projections(grouped, tuple(None if is_int8(w) else self.prepare_linear(w) for w in (q, k, v)))

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> FusedGateUp | tuple[Linear, Linear]:
        """Lay out the two MLP projections: fused where both are plain int8."""
        _check_same_input(gate, up)
        if gate.shape != up.shape:
            raise ValueError(f"gate {gate.shape} and up {up.shape} differ in width")
        if isinstance(gate, Int8Weight) and isinstance(up, Int8Weight):
            return FusedGateUp(int8_matrices([gate, up], self.device, self._magic, pad_rows=True), gate.shape[0])
        return self.prepare_linear(gate), self.prepare_linear(up)

    def prepare_embedding(self, weight: DenseWeight | Int8Weight, tied_head: bool = False) -> DenseMatrix | Int8Group:
        """Lay out a table [vocab, hidden]; one layout serves `embed` and `logits`."""
        return self._factor(weight)

    def nbytes(self, prepared: Linear | Projections | FusedGateUp | tuple[Linear, Linear]) -> int:
        """Bytes resident, padding included."""
        return sum(p.nbytes for p in prepared) if isinstance(prepared, tuple) else prepared.nbytes

    def embed(self, token_ids: Tensor, table: DenseMatrix | Int8Group) -> Tensor:
        """token_ids int64 [T] -> [T, hidden]."""
        if isinstance(table, Int8Group):
            return embedding(token_ids, table.first, self.dtype)
        return F.embedding(token_ids, table.weight)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """x [T, in] -> [T, out]."""
        return self._linear(x, weight, self.dtype)

    def logits(self, x: Tensor, weight: Linear) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab], not rounded to the dtype of activations in between where int8."""
        return self._linear(x, weight, torch.float32)

    def qkv(self, x: Tensor, weight: Projections) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, HQ*D], k [T, HKV*D], v [T, HKV*D], each contiguous."""
        grouped = iter(() if weight.grouped is None else grouped_linear(x, weight.grouped, self.dtype))
        q, k, v = (next(grouped) if single is None else self.linear(x, single) for single in weight.single)
        return q, k, v

    def gate_up_silu(self, x: Tensor, weight: FusedGateUp | tuple[Linear, Linear]) -> Tensor:
        """silu(x gate^T) * (x up^T): [T, width]; where fused a view of rows padded with zeros to 128."""
        if isinstance(weight, FusedGateUp):
            return gate_up_silu(x, weight.matrices, weight.width)
        gate, up = weight
        return silu_mul(self.linear(x, gate), self.linear(x, up))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n] / rms(x) * weight [n], all in float32 and rounded once."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); overwrites `residual`."""
        return add_rms_norm(x, residual, weight, eps)

    def attention_input(
        self, h: Tensor, norm: Norm, weight: Projections, heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops."""
        width = kv.key.shape[-1]
        x = self.rms_norm(h, norm.weight, norm.eps)
        q, k, v = (part.view(len(h), -1, width) for part in self.qkv(x, weight))
        if heads.q_norm is not None:
            q = self.rms_norm(q, heads.q_norm.weight, heads.q_norm.eps)
        if heads.k_norm is not None:
            k = self.rms_norm(k, heads.k_norm.weight, heads.k_norm.eps)
        return self.rotary_store(q, k, v, heads.cos, heads.sin, kv, slots)

    def add_linear(self, h: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """See Ops; overwrites `h`."""
        return h.add_(self.linear(x, weight))

    def mlp_input(self, h: Tensor, norm: Norm, weight: FusedGateUp | tuple[Linear, Linear]) -> Tensor:
        """See Ops."""
        return self.gate_up_silu(self.rms_norm(h, norm.weight, norm.eps), weight)

    def rotary_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """Rotated q [T, HQ, D]; rotated k and v go to `slots` of the cache."""
        return rotary_store(q, k, v, cos, sin, kv, slots)

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """q [T, HQ, D] over the paged cache -> [T, HQ * D]: decoding sequences first, then chunks."""
        if q.shape[1] % kv.key.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads cannot share {kv.key.shape[1]} key/value heads evenly")
        q = q.contiguous()
        out = torch.empty_like(q)
        if batch.num_decodes:
            decode_attention(q, kv, batch, scale, window, out)
        if batch.num_decodes < batch.context_lens.shape[0]:
            prefill_attention(q, kv, batch, scale, window, out)
        return out.flatten(1)

    def _factor(self, weight: DenseWeight | Int8Weight) -> DenseMatrix | Int8Group:
        if isinstance(weight, Int8Weight):
            return int8_group([weight], self.device, self._magic)
        return dense_matrix(weight, self.device, self.dtype)

    def _linear(self, x: Tensor, weight: Linear, out_dtype: torch.dtype) -> Tensor:
        if isinstance(weight, MixedPair):
            return self._linear(self._linear(x, weight.first, self.dtype), weight.second, out_dtype)
        if isinstance(weight, Int8Group):
            return grouped_linear(x, weight, out_dtype)[0]
        return F.linear(x, weight.weight, weight.bias).to(out_dtype)


def _check_same_input(*weights: LinearWeight) -> None:
    widths = {weight.shape[1] for weight in weights}
    if len(widths) != 1:
        raise ValueError(f"projections of one input differ in input width: {sorted(widths)}")
