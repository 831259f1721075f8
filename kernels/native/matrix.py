"""A matrix of integers as the compiled products take it, of whatever kind.

Not how weights become one (`int8`, `int4`) nor where they are used (`backend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from kernels.native.library import ADD, BLOCK, GATE_UP, STORE, CMatrix, Pool
from kernels.ops import Norm


class PackedMatrix:
    """Weights [out, in], several stacked along the outputs, or gate and up in alternate blocks."""

    def __init__(self, c_matrix: CMatrix, tensors: Sequence[Tensor], pool: Pool) -> None:
        """`tensors` are those that `c_matrix` points into, the packed integers first."""
        self.c_matrix = c_matrix
        self.inputs: int = c_matrix.inputs
        self.outputs: int = c_matrix.outputs
        self.levels: int = c_matrix.levels  # largest integer of an activation
        self._tensors = tuple(tensors)
        self._pool = pool
        self.reference = byref(c_matrix)

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def integers(self) -> Tensor:
        """The packed integers, flat, one or two in a byte: where products read them now."""
        return self._tensors[0]

    def move(self, memory: Tensor) -> None:
        """Let products read the packed integers from `memory`, of their size, which is filled when one runs."""
        self._tensors = (memory, *self._tensors[1:])
        self.c_matrix.packed = memory.data_ptr()

    def multiply(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """x float32 [M, in], rows may be strided -> [M, out]; of norm(x) where one is given."""
        y = torch.empty(x.shape[0], self.outputs)
        self._run(x, norm, y, STORE)
        return y

    def add_product(self, h: Tensor, x: Tensor) -> Tensor:
        """h [M, out] += x W^T, in place; rows of both may be strided."""
        self._run(x, None, h, ADD)
        return h

    def gate_up_silu(self, x: Tensor, norm: Norm) -> Tensor:
        """silu(n gate^T) * (n up^T) of n = norm(x) -> [M, out / 2]; only for `alternate`."""
        y = torch.empty(x.shape[0], self.outputs // 2)
        self._run(x, norm, y, GATE_UP)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, ids int64 [T] -> float32 [T, in]; only for one that is not `alternate`.

        Raises IndexError for an id that is no row.
        """
        ids = ids.contiguous()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.outputs:
            raise IndexError(f"row ids from {int(ids.min())} to {int(ids.max())}, but there are {self.outputs} rows")
        out = torch.empty(len(ids), self.inputs)
        self._pool.library.functions.spq_embed(self.reference, ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def _run(self, x: Tensor, norm: Norm | None, y: Tensor, mode: int) -> None:
        if x.dtype != torch.float32 or x.shape[1] != self.inputs or x.stride(1) != 1:
            raise ValueError(f"x {x.dtype} {tuple(x.shape)}: float32 rows of {self.inputs} are needed")
        if mode == ADD and (y.shape != (x.shape[0], self.outputs) or y.stride(1) != 1):
            raise ValueError(f"h {tuple(y.shape)} cannot take a product of shape {(x.shape[0], self.outputs)}")
        weight, eps = (None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps)
        self._pool.library.functions.spq_linear(
            self._pool.address, x.data_ptr(), x.stride(0), x.shape[0], weight, eps, self.reference,
            y.data_ptr(), y.stride(0), mode,
        )  # fmt: skip


def whole_blocks(rows: int) -> int:
    """Rows with those that fill up the last block."""
    return -(-rows // BLOCK) * BLOCK
