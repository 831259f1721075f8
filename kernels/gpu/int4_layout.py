"""How int4 weights lie in GPU memory: four integers a word, a block of inputs after the other, scales by group.

A word of 16 bits holds four inputs that lie a quarter of a block apart, so that unpacking a tile of words gives four
tiles of neighbouring inputs: no shuffle, and the tensor cores' own 16-bit loads (LDSM) bring the words. A block is one
step of the inner loop: 128 inputs, its quarters within one group (128, 64) or groups of their own (32); groups of 16
have blocks of 64. Other groups are served as the largest of these that divides them, their scales repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gpu.configs import MIN_DOT_ROWS, PAD, int4_block_k, round_up
from kernels.gpu.layout import Int4Matrix, stacked_bias
from kernels.weights import Int4Weight

_SYMMETRIC = 8  # the zero point where none is stored


def int4_matrix(
    weights: Sequence[Int4Weight],
    device: torch.device,
    rows: Sequence[int] | None = None,
    *,
    group: int | None = None,
    zeros: bool = False,
) -> Int4Matrix:
    """Lay out matrices [out, in] of one input, padded to `rows` of each (with scale 0: they give zeros).

    In groups of `group` where that is given, with zero points in any case where `zeros`: as others that share a launch.
    Raises ValueError when tensors of a weight disagree, or for a group that the kernels cannot serve.
    """
    rows = rows or [weight.shape[0] for weight in weights]
    group = group or min(kernel_group(weight) for weight in weights)
    width = round_up(weights[0].in_features, PAD)
    symmetric = not zeros and all(weight.zero is None for weight in weights)
    words, scales, zero_points = [], [], []
    for weight, padded_rows in zip(weights, rows, strict=True):
        _check(weight)
        zero = torch.full(weight.scale.shape, _SYMMETRIC, dtype=torch.uint8) if weight.zero is None else weight.zero
        scale, zero = (_by_group(t.to(device), weight, group, width, padded_rows) for t in (weight.scale, zero))
        words.append(_words(weight, zero, group, device))
        scales.append(scale)
        zero_points.append(zero)
    return Int4Matrix(
        weight=torch.cat(words),
        scale=torch.cat(scales).T.contiguous(),
        zero=None if symmetric else torch.cat(zero_points).T.contiguous(),
        bias=stacked_bias(weights, rows, device),
        rows=sum(rows),
        width=width,
        in_features=weights[0].in_features,
        group=group,
    )


def kernel_group(weight: Int4Weight) -> int:
    """The largest of 16, 32, 64, 128 that divides the group; a single group is one of any size."""
    if weight.group >= weight.in_features:
        return PAD
    group = min(weight.group & -weight.group, PAD)  # the largest power of two that divides it
    if group < MIN_DOT_ROWS:
        raise ValueError(f"int4 in groups of {weight.group}: the GPU kernels need a multiple of {MIN_DOT_ROWS}")
    return group


def _check(weight: Int4Weight) -> None:
    out_features, in_features = weight.shape
    groups = (out_features, -(-in_features // weight.group))
    for name, tensor, shape in (
        ("qweight", weight.qweight, (out_features, -(-in_features // 2))),
        ("scale", weight.scale, groups),
        ("zero", weight.zero, groups),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of int4 has shape {tuple(tensor.shape)}; {list(shape)} is needed")
    for name, tensor in (("qweight", weight.qweight), ("zero", weight.zero)):
        if tensor is not None and tensor.dtype != torch.uint8:
            raise ValueError(f"{name} of int4 is {tensor.dtype}; uint8 is needed")


def _by_group(values: Tensor, weight: Int4Weight, group: int, width: int, rows: int) -> Tensor:
    """[out, groups as stored] -> [rows, width / group], repeated where those are smaller; 0 past out and in."""
    first = torch.arange(0, width, group, device=values.device)
    found = values[:, (first // weight.group).clamp_max(values.shape[1] - 1)]
    found = torch.where(first < weight.in_features, found, torch.zeros_like(found))
    return torch.nn.functional.pad(found, (0, 0, 0, rows - len(found)))


def _words(weight: Int4Weight, zero: Tensor, group: int, device: torch.device) -> Tensor:
    """int16 [rows * width / 4] for zero points [rows, width / group]; padding holds the zero point: a weight of 0."""
    stored = weight.qweight.to(device)
    q = zero.repeat_interleave(group, dim=1)
    stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    q[: len(stored), : weight.in_features] = stored[:, : weight.in_features]
    block = int4_block_k(group)
    parts = q.view(len(q), -1, 4, block // 4)
    low, high = parts[:, :, 0] | (parts[:, :, 1] << 4), parts[:, :, 2] | (parts[:, :, 3] << 4)
    return torch.stack((low, high), dim=-1).view(torch.int16).view(-1)
