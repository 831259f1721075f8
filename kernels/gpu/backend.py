"""The operations of `kernels.ops` on a CUDA device: Triton kernels for int8 and int4, cuBLAS for float matrices.

Nothing here waits for the device or reads from it, so that a whole step can be captured in a CUDA graph. Under
TRITON_INTERPRET=1 the same code runs on CPU tensors, slowly: that is how it is tested without a GPU.

Steps of up to `DECODE_ROWS` tokens take the fused kernels: a low-rank layer is seven launches, one of plain int8
matrices five. Longer steps norm their input in a kernel of its own: folded in, every program would repeat the
arithmetic of its rows beside tensor cores that are already busy (a tile of 128 x 128 x 64 takes about 512 cycles of
them and 8,192 elements to convert, multiply and round), while the kernel moves 8 MB for 512 x 4,096, some 3 us of a
layer's hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.gpu.configs import DECODE_ROWS, PAD, round_up
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.embedding import embedding
from kernels.gpu.gate_up import gate_up_silu, silu_mul
from kernels.gpu.head_layout import HeadProjections, can_fuse_heads, head_projections
from kernels.gpu.head_linear import head_linear
from kernels.gpu.heads import transform_heads
from kernels.gpu.int8_prefill import int8_rows_linear, quantize_rows
from kernels.gpu.launch import GpuContext
from kernels.gpu.layout import Int8Matrix, PackedMatrix, PackedPair, dense_matrix
from kernels.gpu.norm import rms_norm
from kernels.gpu.packed_linear import packed_linear, packed_linear_kernel
from kernels.gpu.pairs import correction, is_packed_pair, packed_matrix, packed_pair, share_a_kind
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.prepared import (
    Corrected,
    FusedGateUp,
    GateUp,
    Linear,
    Matrix,
    MixedPair,
    Projections,
    StackedCorrected,
    can_stack,
    check_correction,
    stacked_corrected,
)
from kernels.gpu.stores import IntegerStore, layer_stores
from kernels.layers import Layer, run_one_by_one
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.reference import check_same_input
from kernels.weights import CorrectedWeight, DenseWeight, Leaf, LinearWeight, LowRankWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonOps:
    """`Ops` for float16 and bfloat16 activations; float32 for checks (slow, exact products)."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, int8_prefill: bool = False) -> None:
        """With `int8_prefill` steps of more than `DECODE_ROWS` tokens round the inputs of int8 matrices to int8 as well
        (one scale per token): faster and lossy, see `int8_prefill`; logits do not.

        Raises ValueError for another dtype, RuntimeError where the kernels cannot run on the device.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype} is none of float16, bfloat16, float32")
        interpreted = not isinstance(packed_linear_kernel, JITFunction)
        if device.type == "cuda" and interpreted:
            raise RuntimeError("TRITON_INTERPRET is set: kernels would run in the interpreter; unset it for a GPU")
        if device.type == "cuda" and device.index not in (None, 0):
            raise RuntimeError(f"device {device} is not the first one; choose a GPU with CUDA_VISIBLE_DEVICES")
        if device.type != "cuda" and not (device.type == "cpu" and interpreted):
            raise RuntimeError(f"device {device} cannot run Triton kernels; a CUDA device is needed")
        self.device = device
        self.dtype = dtype
        self.int8_prefill = int8_prefill
        self.gpu = GpuContext.of(device, dtype)
        self._magic = dtype == torch.float16  # see primitives.dequantize

    def use_threads(self, count: int) -> None:
        """Let `count` CPU threads work from now on: torch's own."""
        torch.set_num_threads(count)

    def prepare_linear(self, weight: LinearWeight) -> Linear:
        """Lay out one matrix. Raises ValueError when shapes disagree, or for int4 groups that no kernel serves."""
        if isinstance(weight, CorrectedWeight):
            check_correction(weight)
            return Corrected(self._matrix(weight.main), self._pair(weight.correction, corrects=True))
        return self._pair(weight) if isinstance(weight, LowRankWeight) else self._matrix(weight)

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> Projections:
        """Lay out the three projections: fused where all are int8 or all int4, pairs or not."""
        check_same_input(q, k, v)
        if can_fuse_heads((q, k, v)):
            return head_projections((q, k, v), self.device, self._magic)
        if can_stack((q, k, v)):
            return stacked_corrected((q, k, v), self.device, self._magic, pad_rows=False)
        return self.prepare_linear(q), self.prepare_linear(k), self.prepare_linear(v)

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> GateUp:
        """Lay out the two MLP projections: fused where both are plain int8 or plain int4."""
        check_same_input(gate, up)
        if gate.shape != up.shape:
            raise ValueError(f"gate {gate.shape} and up {up.shape} differ in width")
        if can_stack((gate, up)):
            return stacked_corrected((gate, up), self.device, self._magic, pad_rows=True)
        if share_a_kind((gate, up)):
            assert not isinstance(gate, DenseWeight | LowRankWeight | CorrectedWeight)
            assert not isinstance(up, DenseWeight | LowRankWeight | CorrectedWeight)
            rows = round_up(gate.shape[0], PAD)
            return FusedGateUp(packed_matrix([gate, up], self.device, self._magic, [rows, rows]), gate.shape[0])
        return self.prepare_linear(gate), self.prepare_linear(up)

    def prepare_embedding(self, weight: Leaf, tied_head: bool = False) -> Matrix:
        """Lay out a table [vocab, hidden]; one layout serves `embed` and `logits`."""
        return self._matrix(weight)

    def nbytes(self, prepared: Linear | Projections | GateUp) -> int:
        """Bytes resident, padding included."""
        return sum(p.nbytes for p in prepared) if isinstance(prepared, tuple) else prepared.nbytes

    def stores(self, layer: Layer) -> list[IntegerStore]:
        """The matrices of a layer whose integers may be moved."""
        return layer_stores(layer)

    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        """token_ids int64 [T] -> [T, hidden]."""
        if isinstance(table, PackedMatrix):
            return embedding(token_ids, table, self.dtype)
        return F.embedding(token_ids, table.weight)

    def run_layers(
        self, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
        batch: AttentionBatch, scale: float,
    ) -> Tensor:  # fmt: skip
        """One after the other."""
        return run_one_by_one(self, h, layers, cos, sin, cache, batch, scale)

    def attention_input(
        self, h: Tensor, norm: Norm, weight: Projections, heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops."""
        if isinstance(weight, tuple):
            x = self.rms_norm(h, norm.weight, norm.eps)
            q, k, v = (self.linear(x, projection) for projection in weight)
            return transform_heads(q, k, v, heads, kv, slots)
        if isinstance(weight, StackedCorrected):
            q, k, v = self._stacked(h, norm, weight)
            return transform_heads(q, k, v, heads, kv, slots)
        fused = len(h) <= DECODE_ROWS
        if fused and weight.heads.starts is None:
            return head_linear(self.gpu, h, weight.heads, heads, kv, slots, norm=norm)
        x = self._product(h, weight.first, norm=norm)
        if fused:
            return head_linear(self.gpu, x, weight.heads, heads, kv, slots)
        q, k, v = self._second_factors(x, weight)
        return transform_heads(q, k, v, heads, kv, slots)

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """q [T, HQ, D] over the paged cache -> [T, HQ * D]: decoding sequences first, then chunks."""
        if q.shape[1] % kv.key.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads cannot share {kv.key.shape[1]} key/value heads evenly")
        q = q.contiguous()
        out = torch.empty_like(q)
        if batch.num_decodes:
            decode_attention(self.gpu, q, kv, batch, scale, window, out)
        if batch.num_decodes < batch.context_lens.shape[0]:
            prefill_attention(q, kv, batch, scale, window, out)
        return out.flatten(1)

    def add_linear(self, h: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """See Ops; overwrites `h`, the sum is rounded once, with a correction twice."""
        if isinstance(weight, Corrected):
            return self._correct(self.add_linear(h, x, weight.main), x, weight.correction)
        if isinstance(weight, PackedPair):
            return self._product(self._product(x, weight.first), weight.second, add_to=h)
        if isinstance(weight, MixedPair):
            return self.add_linear(h, self.linear(x, weight.first), weight.second)
        if isinstance(weight, PackedMatrix):
            return self._product(x, weight, add_to=h)
        return (h if weight.bias is None else h.add_(weight.bias)).addmm_(x, weight.weight.T)

    def mlp_input(self, h: Tensor, norm: Norm, weight: GateUp) -> Tensor:
        """See Ops; where fused a view of rows padded with zeros to a multiple of 128."""
        if isinstance(weight, FusedGateUp) and len(h) <= DECODE_ROWS:
            return gate_up_silu(self.gpu, h, weight.matrix, weight.width, norm=norm)
        if isinstance(weight, StackedCorrected):
            return silu_mul(*self._stacked(h, norm, weight))[:, : weight.width]
        if isinstance(weight, FusedGateUp) and isinstance(weight.matrix, Int8Matrix) and self.int8_prefill:
            rows, n = quantize_rows(h, weight.matrix.width, norm), weight.matrix.rows // 2
            parts = (weight.matrix.part(0, n), weight.matrix.part(n, 2 * n))
            return silu_mul(*(int8_rows_linear(self.gpu, rows, part, self.dtype) for part in parts))[:, : weight.width]
        x = self.rms_norm(h, norm.weight, norm.eps)
        if isinstance(weight, FusedGateUp):
            return gate_up_silu(self.gpu, x, weight.matrix, weight.width)
        gate, up = weight
        return silu_mul(self.linear(x, gate), self.linear(x, up))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n] / rms(x) * weight [n], all in float32 and rounded once."""
        return rms_norm(x, weight, eps)

    def logits(self, x: Tensor, weight: Linear) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab], not rounded to the dtype of activations in between where int8."""
        return self.linear(x, weight, torch.float32)

    def linear(self, x: Tensor, weight: Linear, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] -> [T, out], in the dtype of activations where no other is given."""
        if isinstance(weight, Corrected):
            return self._correct(self.linear(x, weight.main, out_dtype), x, weight.correction)
        if isinstance(weight, PackedPair | MixedPair):
            return self.linear(self.linear(x, weight.first), weight.second, out_dtype)
        if isinstance(weight, PackedMatrix):
            return packed_linear(self.gpu, x, weight, out_dtype or self.dtype)
        return F.linear(x, weight.weight, weight.bias).to(out_dtype or self.dtype)

    def _correct(self, y: Tensor, x: Tensor, pair: PackedPair | MixedPair) -> Tensor:
        """y [T, out] += the product of x with a pair, whose inputs are never rounded to int8."""
        inner = self.linear(x, pair.first)
        if isinstance(pair.second, PackedMatrix):
            return packed_linear(self.gpu, inner, pair.second, y.dtype, add_to=y)
        return y.add_(self.linear(inner, pair.second, y.dtype))

    def _stacked(self, h: Tensor, norm: Norm, weight: StackedCorrected) -> tuple[Tensor, ...]:
        """The product of norm(h) with each of the matrices, columns of one tensor [T, all]."""
        if len(h) <= DECODE_ROWS:
            y = self._product(h, weight.main, norm=norm)
            inner = self._product(h, weight.first, norm=norm)
        else:
            x = self.rms_norm(h, norm.weight, norm.eps)
            y, inner = self._product(x, weight.main), self.linear(x, weight.first)
        for part in weight.additions:
            columns = inner[:, part.start : part.start + part.second.width]
            to = y[:, part.to : part.to + part.second.rows]
            packed_linear(self.gpu, columns, part.second, self.dtype, add_to=to)
        return torch.split(y, list(weight.columns), 1)

    def _product(
        self, x: Tensor, matrix: PackedMatrix, *, norm: Norm | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """A product inside a layer: few rows with the norm folded in, many with a norm before or, of int8, in int8."""
        if len(x) <= DECODE_ROWS:
            return packed_linear(self.gpu, x, matrix, self.dtype, norm=norm, add_to=add_to)
        if self.int8_prefill and isinstance(matrix, Int8Matrix):
            return int8_rows_linear(self.gpu, quantize_rows(x, matrix.width, norm), matrix, self.dtype, add_to)
        normed = x if norm is None else self.rms_norm(x, norm.weight, norm.eps)
        return packed_linear(self.gpu, normed, matrix, self.dtype, add_to=add_to)

    def _second_factors(self, x: Tensor, weight: HeadProjections) -> list[Tensor]:
        """q, k, v from what the first factors made: a product each, or the columns themselves."""
        starts, outputs = weight.heads.starts, []
        if starts is None:
            return list(torch.split(x, list(weight.heads.rows), 1))
        for i, (start, width, rows) in enumerate(zip(starts, weight.heads.widths, weight.heads.rows, strict=True)):
            if width:
                outputs.append(self._product(x[:, start : start + width], weight.heads.matrix(i)))
            else:
                outputs.append(x[:, start : start + rows])
        return outputs

    def _matrix(self, weight: Leaf) -> Matrix:
        if isinstance(weight, DenseWeight):
            return dense_matrix(weight, self.device, self.dtype)
        return packed_matrix([weight], self.device, self._magic)

    def _pair(self, weight: LowRankWeight, *, corrects: bool = False) -> PackedPair | MixedPair:
        if is_packed_pair(weight):
            return (correction if corrects else packed_pair)(weight, self.device, self._magic)
        if weight.up.shape[1] != weight.rank:
            raise ValueError(f"factors {weight.up.shape} and {weight.down.shape} disagree in rank")
        return MixedPair(self._matrix(weight.down), self._matrix(weight.up))
