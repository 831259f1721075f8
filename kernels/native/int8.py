"""Int8 weights packed for the compiled product, and how exact it is.

Not the product (int8.c, linear.c). An activation row x becomes integers |a| <= levels with the step max|x| / levels;
integer sums are exact, so with int8 weights q and row scale s an output differs from the exact product by at most

    max|x| s sum|q| (1 / (2 levels) + 2^-20),

where 2^-20 covers the float32 roundings (reciprocal and product before rounding to integers, sum to float32, sums of
segments, two scales, adding to the residual stream excepted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.native.library import BLOCK, CMatrix, Pool
from kernels.native.matrix import PackedMatrix, whole_blocks
from kernels.weights import Int8Weight

MOST_LEVELS = 32767
WANTED_LEVELS = 16384  # sums are cut into segments until activations keep at least 15 bits with their sign
ROUNDING = 2.0**-20


def int8_matrix(parts: Sequence[Int8Weight], pool: Pool, *, alternate: bool = False) -> PackedMatrix:
    """The parts stacked, or with `alternate` gate and up of one shape in alternate blocks. Their tensors are copied."""
    inputs, outputs = parts[0].shape[1], sum(part.shape[0] for part in parts)
    even = inputs + inputs % 2
    if alternate:
        rows = whole_blocks(parts[0].shape[0])
        packed, scale = torch.empty(2 * rows * even, dtype=torch.int8), torch.zeros(2 * rows)
        blocks = scale.view(-1, 2, BLOCK)
        for i, part in enumerate(parts):
            _pack(part.qweight, packed, pool, every=2, first=i)
            blocks[:, i] = torch.nn.functional.pad(part.scale.float(), (0, rows - part.shape[0])).view(-1, BLOCK)
    else:
        stacked = parts[0].qweight if len(parts) == 1 else torch.cat([part.qweight for part in parts])
        packed, scale = torch.empty(whole_blocks(outputs) * even, dtype=torch.int8), torch.zeros(whole_blocks(outputs))
        _pack(stacked, packed, pool, every=1, first=0)
        torch.cat([part.scale.float() for part in parts], out=scale[:outputs])
    segment, levels = choose_levels([part.qweight for part in parts])
    c_matrix = CMatrix(
        packed=packed.data_ptr(), scale=scale.data_ptr(), outputs=outputs, inputs=inputs, segment=segment, levels=levels
    )
    return PackedMatrix(c_matrix, (packed, scale), pool)


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


def int8_bound(x: Tensor, weight: Int8Weight, levels: int | None = None) -> Tensor:
    """float64 [M, out]: the most a product may differ from the exact one (module docstring).

    `levels` are those of the packed matrix; by default those of this weight packed alone.
    """
    if levels is None:
        levels = choose_levels([weight.qweight])[1]
    largest = x.abs().amax(-1, keepdim=True).double().clamp_min(1e-30)
    weights = weight.qweight.double().abs().sum(-1) * weight.scale.double().abs()
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


def _pack(weight: Tensor, packed: Tensor, pool: Pool, *, every: int, first: int) -> None:
    weight = weight.contiguous()
    rows, columns = weight.shape
    pool.library.functions.spq_pack_int8(weight.data_ptr(), rows, columns, columns, packed.data_ptr(), every, first)
