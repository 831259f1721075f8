"""Int8 matrices packed for the compiled product, and how exact it is.

Not where they are used (`kernels.native.backend`). An activation row x becomes integers |a| <= levels with the step
max|x| / levels; integer sums are exact, so with int8 weights q and row scale s an output differs from the exact product
by at most

    max|x| s sum|q| (1 / (2 levels) + 2^-20),

where 2^-20 covers the float32 roundings (reciprocal and product before rounding to integers, sum to float32, sums of
segments, two scales, adding to the residual stream excepted).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from kernels.native.library import ADD, BLOCK, GATE_UP, STORE, CMatrix, Pool
from kernels.ops import Norm
from kernels.weights import Int8Weight

MOST_LEVELS = 32767
WANTED_LEVELS = 16384  # sums are cut into segments until activations keep at least 15 bits with their sign
ROUNDING = 2.0**-20


class PackedMatrix:
    """Int8 weights [out, in], several stacked along the outputs, or gate and up in alternate blocks."""

    def __init__(self, parts: Sequence[Int8Weight], pool: Pool, *, alternate: bool = False) -> None:
        """With `alternate`, `parts` are gate and up of one shape. The parts' tensors are copied, not kept."""
        self.inputs = parts[0].shape[1]
        self.outputs = sum(part.shape[0] for part in parts)
        self._pool = pool
        self._alternate = alternate
        even = self.inputs + self.inputs % 2
        if alternate:
            rows = _whole(parts[0].shape[0])
            self._packed = torch.empty(2 * rows * even, dtype=torch.int8)
            self._scale = torch.zeros(2 * rows)
            blocks = self._scale.view(-1, 2, BLOCK)
            for i, part in enumerate(parts):
                self._pack(part.qweight, self._packed, every=2, first=i)
                blocks[:, i] = torch.nn.functional.pad(part.scale.float(), (0, rows - part.shape[0])).view(-1, BLOCK)
        else:
            stacked = parts[0].qweight if len(parts) == 1 else torch.cat([part.qweight for part in parts])
            self._packed = torch.empty(_whole(self.outputs) * even, dtype=torch.int8)
            self._pack(stacked, self._packed, every=1, first=0)
            self._scale = torch.zeros(_whole(self.outputs))
            torch.cat([part.scale.float() for part in parts], out=self._scale[: self.outputs])
        segment, self.levels = choose_levels([part.qweight for part in parts])
        self.c_matrix = CMatrix(
            self._packed.data_ptr(), self._scale.data_ptr(), self.outputs, self.inputs, segment, self.levels
        )
        self._reference = byref(self.c_matrix)

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self._packed.nbytes + self._scale.nbytes

    def multiply(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """x float32 [M, in], rows may be strided -> [M, out]; of norm(x) where one is given."""
        y = torch.empty(x.shape[0], self.outputs)
        self._run(x, norm, y, STORE)
        return y

    def add_product(self, h: Tensor, x: Tensor) -> Tensor:
        """h [M, out] += x W^T, in place."""
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
        self._pool.library.functions.spq_embed(self._reference, ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def _run(self, x: Tensor, norm: Norm | None, y: Tensor, mode: int) -> None:
        if x.dtype != torch.float32 or x.shape[1] != self.inputs or x.stride(1) != 1:
            raise ValueError(f"x {x.dtype} {tuple(x.shape)}: float32 rows of {self.inputs} are needed")
        if mode == ADD and (y.shape != (x.shape[0], self.outputs) or not y.is_contiguous()):
            raise ValueError(f"h {tuple(y.shape)} cannot take a product of shape {(x.shape[0], self.outputs)}")
        weight, eps = (None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps)
        self._pool.library.functions.spq_linear(
            self._pool.address, x.data_ptr(), x.stride(0), x.shape[0], weight, eps, self._reference,
            y.data_ptr(), y.shape[1], mode,
        )  # fmt: skip

    def _pack(self, weight: Tensor, packed: Tensor, *, every: int, first: int) -> None:
        weight = weight.contiguous()
        rows, columns = weight.shape
        self._pool.library.functions.spq_pack(
            weight.data_ptr(), rows, columns, columns, packed.data_ptr(), every, first
        )


def choose_levels(weights: Sequence[Tensor]) -> tuple[int, int]:
    """(inputs of one integer sum, largest integer of an activation) so that no sum can leave 32 bits."""
    inputs = weights[0].shape[1]
    pieces = 1
    while True:
        segment = -(-inputs // pieces)
        segment += segment % 2
        largest = max(1, max(_largest_sum(weight, segment) for weight in weights))
        levels = min(MOST_LEVELS, (2**31 - 1) // largest)
        if levels >= WANTED_LEVELS or segment == 2:
            return segment, levels
        pieces += 1


def product_bound(x: Tensor, qweight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """float64 [M, out]: the most a product may differ from the exact one (module docstring)."""
    largest = x.abs().amax(-1, keepdim=True).double().clamp_min(1e-30)
    weights = qweight.double().abs().sum(-1) * scale.double().abs()
    return largest * weights * (0.5 / levels + ROUNDING) + torch.finfo(torch.float32).tiny


def _largest_sum(weight: Tensor, segment: int) -> int:
    """Largest sum of magnitudes of a row within one segment, a block of rows at a time to bound the copies."""
    largest = 0
    for rows in torch.split(weight, 1024):
        magnitudes = rows.to(torch.int16).abs()
        largest = max(
            largest, *(int(part.sum(1, dtype=torch.int32).max()) for part in torch.split(magnitudes, segment, 1))
        )
    return largest


def _whole(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK
