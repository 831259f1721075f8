"""Int4 weights packed for the compiled product, and how exact it is.

Not the product (int4.c, linear.c). An activation row x becomes integers |a| <= levels with the step max|x| / levels.
Sums of a group, of a q and of a alone, are exact, so with scales s and zero points z of the groups g an output differs
from the exact product by at most

    max|x| sum_g (s_g sum|q - z_g|) (1 / (2 levels) + 2^-20 + groups 2^-24),

where 2^-20 covers the float32 roundings of any product (reciprocal and product before rounding to integers, a group's
sum to float32, its scale, the step) and each group adds one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from kernels.native.library import BLOCK, KINDS, CMatrix, Pool
from kernels.native.matrix import PackedMatrix, whole_blocks
from kernels.weights import Int4Weight

MOST_LEVELS = 32767
SYMMETRIC_ZERO = 8
ROUNDING = 2.0**-20


def int4_matrix(parts: Sequence[Int4Weight], pool: Pool, *, alternate: bool = False) -> PackedMatrix:
    """The parts stacked, or with `alternate` gate and up of one shape in alternate blocks. Their tensors are copied.

    Raises ValueError where their groups differ. Scales stay float16 where all are; zero points are kept where any has
    them.
    """
    if len({part.group for part in parts}) != 1:
        raise ValueError(f"int4 weights of groups {[part.group for part in parts]} cannot be stacked")
    inputs, group = parts[0].in_features, parts[0].group
    outputs = sum(part.shape[0] for part in parts)
    rows = sum(whole_blocks(part.shape[0]) for part in parts) if alternate else whole_blocks(outputs)
    half = all(part.scale.dtype == torch.float16 for part in parts)
    scale = _blocks([part.scale if half else part.scale.float() for part in parts], alternate)
    zero = None
    if any(part.zero is not None for part in parts):
        zero = _blocks([_zeros(part) for part in parts], alternate)
    c_matrix = CMatrix(
        scale=scale.data_ptr(), outputs=outputs, inputs=inputs, levels=levels_for(min(group, inputs)), group=group,
        zero=None if zero is None else zero.data_ptr(), scale_kind=KINDS[scale.dtype],
    )  # fmt: skip
    functions = pool.library.functions
    packed = torch.empty(rows // BLOCK * functions.spq_int4_block_bytes(byref(c_matrix)), dtype=torch.uint8)
    c_matrix.packed = packed.data_ptr()
    if not alternate and len(parts) > 1:
        halves = [torch.cat([part.qweight for part in parts])]
    else:
        halves = [part.qweight.contiguous() for part in parts]
    for i, part in enumerate(halves):
        functions.spq_pack_int4(byref(c_matrix), part.data_ptr(), len(part), packed.data_ptr(), len(halves), i)
    return PackedMatrix(c_matrix, [t for t in (packed, scale, zero) if t is not None], pool)


def levels_for(group: int) -> int:
    """Largest integer of an activation so that no sum of `group` products with 0..15 can leave 32 bits."""
    return min(MOST_LEVELS, (2**31 - 1) // (15 * group))


def int4_bound(x: Tensor, weight: Int4Weight) -> Tensor:
    """float64 [M, out]: the most a product may differ from the exact one (module docstring)."""
    largest = x.abs().amax(-1, keepdim=True).double().clamp_min(1e-30)
    weights = weight.dequantize().double().abs().sum(-1)
    rounding = ROUNDING + weight.scale.shape[1] * 2.0**-24
    step = 0.5 / levels_for(min(weight.group, weight.in_features))
    return largest * weights * (step + rounding) + torch.finfo(torch.float32).tiny


def _zeros(part: Int4Weight) -> Tensor:
    if part.zero is not None:
        return part.zero
    return torch.full(part.scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8)


def _blocks(parts: Sequence[Tensor], alternate: bool) -> Tensor:
    """[out, groups] of each part -> [blocks, groups, BLOCK], blocks of two parts in turn where they alternate."""

    def split(part: Tensor) -> Tensor:
        rows, groups = part.shape
        filled = torch.nn.functional.pad(part, (0, 0, 0, whole_blocks(rows) - rows))
        return filled.view(-1, BLOCK, groups).transpose(1, 2)

    if alternate:
        return torch.stack([split(part) for part in parts], 1).flatten(0, 1).contiguous()
    return split(torch.cat(list(parts))).contiguous()
