"""`Ops` on the compiled operations: int8 and int4 matrices in C, float ones in torch, activations float32.

Not the portable CPU implementation (`kernels.cpu`), which serves where no extension was built. Norms,
SiLU, rotation and the residual sum are inside the operations; a step is one call for all layers where they fit
(`kernels.native.program`), else some six calls a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from kernels.cpu import check_gate_up, rms_norm
from kernels.cpu_attention import paged_attention
from kernels.cpu_linear import FloatMatrix, Joint, Matrix, join
from kernels.layers import Layer, run_one_by_one
from kernels.native.int4 import int4_matrix
from kernels.native.int8 import int8_matrix
from kernels.native.library import WIDEST_HEAD, CHeads, CQueries, Pool, c_cache, machine_choice
from kernels.native.matrix import PackedMatrix
from kernels.native.program import Program, fits, matrices
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.reference import check_same_input
from kernels.weights import DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight

Rows = PackedMatrix | FloatMatrix  # an embedding; one of integers is packed once for `embed` and `logits`


class NativeOps:
    """See kernels.ops.Ops. Raises ValueError for a device that is not a CPU or activations other than float32, and
    RuntimeError where no extension can run here.

    A product of a row with integers does not depend on the other rows, bit for bit, nor does attention on other
    sequences.
    """

    name = "native"

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        if device.type != "cpu":
            raise ValueError(f"backend 'native' on device {device}: name a CPU device, or backend 'triton' for CUDA")
        if dtype != torch.float32:
            raise ValueError(f"dtype {dtype} on a CPU: only float32 is supported; set dtype to float32 or auto")
        choice = machine_choice()
        if choice.library is None:
            raise RuntimeError(f"backend 'native' cannot run here: {choice.reason}; use backend 'cpu'")
        self.device = device
        self.dtype = dtype
        self.linear_method = f"native{choice.library.name}"
        self.linear_reason = choice.reason
        self._functions = choice.library.functions
        self._pool = Pool(choice.library, torch.get_num_threads())
        self._floats = False  # matrices that torch multiplies
        self._programs: dict[int, Program] = {}  # by the list of layers, over the cache that ran last

    def use_threads(self, count: int) -> None:
        """Let `count` threads work, at most as many as torch had when this was made.

        torch gets one, unless it has float matrices to multiply: its threads spin for a while after each operation, and
        would take the cores from ours.
        """
        self._pool.limit(count)
        torch.set_num_threads(count if self._floats else 1)

    def prepare_linear(self, weight: LinearWeight) -> Joint:
        """Pack one matrix or pair. The caller's tensors of integers are copied: drop them."""
        return join([weight], self._lay_out)

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> Joint:
        """Pack three projections of one input. Raises ValueError when their input widths differ."""
        check_same_input(q, k, v)
        return join([q, k, v], self._lay_out)

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> Joint | PackedMatrix:
        """Pack two projections of one input. Raises ValueError when their shapes differ."""
        check_gate_up(gate, up)
        if gate.bias is None and up.bias is None:
            if isinstance(gate, Int8Weight) and isinstance(up, Int8Weight):
                return int8_matrix([gate, up], self._pool, alternate=True)
            if isinstance(gate, Int4Weight) and isinstance(up, Int4Weight) and gate.group == up.group:
                return int4_matrix([gate, up], self._pool, alternate=True)
        return join([gate, up], self._lay_out)

    def prepare_embedding(self, weight: Leaf, tied_head: bool = False) -> Rows:
        """Pack a table of integers once, whether the head is tied to it or not; a float one is kept as it is stored."""
        if not isinstance(weight, DenseWeight):
            return self._lay_out([weight])
        self._floats |= tied_head
        return FloatMatrix(weight.weight.float() if tied_head else weight.weight)

    def nbytes(self, prepared: Joint | Rows) -> int:
        """Bytes resident, padding included."""
        return prepared.nbytes

    def stores(self, layer: Layer) -> list[PackedMatrix]:
        """The matrices of a layer whose integers may be moved (`PackedMatrix.move`)."""
        return [matrix for matrix in matrices(layer) if isinstance(matrix, PackedMatrix)]

    def embed(self, token_ids: Tensor, table: Rows) -> Tensor:
        """token_ids int64 [T] -> float32 [T, hidden]."""
        if isinstance(table, PackedMatrix):
            return table.rows(token_ids)
        return table.weight.index_select(0, token_ids).float()

    def linear(self, x: Tensor, weight: Joint) -> Tensor:
        """x float32 [T, in] -> [T, out]."""
        return weight.apply(x)[0]

    def run_layers(
        self, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
        batch: AttentionBatch, scale: float,
    ) -> Tensor:  # fmt: skip
        """See Ops; one call into C where all layers fit a `Program`."""
        program = self._programs.get(id(layers))
        if program is None or program.layers is not layers or program.cache is not cache:
            if not fits(layers, cache):
                return run_one_by_one(self, h, layers, cos, sin, cache, batch, scale)
            program = self._programs[id(layers)] = Program(layers, cache, self._pool)
        return program.run(h, cos, sin, batch, scale)

    def attention_input(
        self, h: Tensor, norm: Norm, weight: Joint, heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """See Ops. Raises ValueError for heads of odd width or wider than 512."""
        width = kv.key.shape[-1]
        if width % 2 or width > WIDEST_HEAD:
            raise ValueError(f"heads of {width}: an even width of at most {WIDEST_HEAD} is needed; use backend 'cpu'")
        q, k, v = self._apply(weight, h, norm)
        rotated = torch.empty(h.shape[0], q.shape[1] // width, width)
        q_norm, k_norm = heads.q_norm, heads.k_norm
        cos, sin = heads.cos.contiguous(), heads.sin.contiguous()
        arguments = CHeads(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0),
            h.shape[0], rotated.shape[1], cos.data_ptr(), sin.data_ptr(),
            None if q_norm is None else q_norm.weight.data_ptr(), None if k_norm is None else k_norm.weight.data_ptr(),
            0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps,
            slots.data_ptr(), rotated.data_ptr(),
        )  # fmt: skip
        self._functions.spq_heads(self._pool.address, byref(arguments), byref(c_cache(kv)))
        return rotated

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """See Ops. Heads whose width is no multiple of 8 take the portable way."""
        tokens, heads, width = q.shape
        if width % 8:
            return paged_attention(q, kv, batch, scale, window)
        out = torch.empty(tokens, heads * width)
        tables = batch.block_tables
        arguments = CQueries(
            q.data_ptr(), out.data_ptr(), tables.data_ptr(), batch.context_lens.data_ptr(),
            batch.query_starts.data_ptr(), tables.shape[0], tables.stride(0), batch.block_size, heads, window or 0,
            scale,
        )  # fmt: skip
        self._functions.spq_attention(self._pool.address, byref(arguments), byref(c_cache(kv)))
        return out

    def add_linear(self, h: Tensor, x: Tensor, weight: Joint) -> Tensor:
        """See Ops; overwrites `h`."""
        output = weight.outputs[0]
        for term in output.terms:
            first = weight.firsts[term.first]
            h = _add(h, x, first) if term.up is None else _add(h, first.multiply(x), term.up)
        return h if output.bias is None else h.add_(output.bias)

    def mlp_input(self, h: Tensor, norm: Norm, weight: Joint | PackedMatrix) -> Tensor:
        """See Ops."""
        if isinstance(weight, PackedMatrix):
            return weight.gate_up_silu(h, norm)
        gate, up = self._apply(weight, h, norm)
        self._functions.spq_silu_mul(
            self._pool.address, gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), *gate.shape
        )
        return gate

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n] float32 -> the same shape."""
        return rms_norm(x, weight, eps)

    def logits(self, x: Tensor, weight: Joint | Rows) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab]."""
        if not isinstance(weight, Joint):
            return weight.multiply(x)
        return weight.apply(x)[0]

    def _apply(self, weight: Joint, h: Tensor, norm: Norm) -> list[Tensor]:
        """The projections of norm(h)."""
        products = [
            matrix.multiply(h, norm)
            if isinstance(matrix, PackedMatrix)
            else matrix.multiply(self.rms_norm(h, norm.weight, norm.eps))
            for matrix in weight.firsts
        ]
        return weight.finish(products)

    def _lay_out(self, leaves: list[Leaf]) -> PackedMatrix | FloatMatrix:
        quantized = [leaf for leaf in leaves if isinstance(leaf, Int8Weight)]
        if quantized:
            return int8_matrix(quantized, self._pool)
        halves = [leaf for leaf in leaves if isinstance(leaf, Int4Weight)]
        if halves:
            return int4_matrix(halves, self._pool)
        self._floats = True
        floats = [leaf.weight.float() for leaf in leaves if isinstance(leaf, DenseWeight)]
        return FloatMatrix(floats[0].contiguous() if len(floats) == 1 else torch.cat(floats))


def _add(h: Tensor, x: Tensor, matrix: Matrix) -> Tensor:
    """h += x W^T."""
    return matrix.add_product(h, x) if isinstance(matrix, PackedMatrix) else h.add_(matrix.multiply(x))
