"""How q, k and v projections lie in GPU memory, so that one launch, or two with low-rank pairs, serve all heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.configs import PAD, round_up
from kernels.gpu.int4_layout import int4_matrix, kernel_group
from kernels.gpu.layout import Int4Matrix, Int8Matrix, PackedMatrix
from kernels.gpu.pairs import PackedWeight, is_packed_pair, packed_factors, packed_matrix, share_a_kind
from kernels.weights import Int4Weight, LinearWeight, LowRankWeight


@dataclass(slots=True)
class HeadFactors:
    """The matrices in front of q, k and v heads, rows one after the other; widths may differ.

    Either all read the whole input (`starts` is None, one width), or projection i reads columns starts[i] to
    starts[i] + widths[i] of what the first factors made; where its width is 0 that is the projection itself.
    """

    weight: Tensor  # flat, as in Int8Matrix or Int4Matrix
    scale: Tensor  # int8: float32 [sum of rows], 1 where the width is 0; int4: as in Int4Matrix, flat
    zero: Tensor | None  # of int4, as `scale`
    bias: Tensor | None  # float32 [sum of rows]
    rows: tuple[int, int, int]
    widths: tuple[int, int, int]
    starts: tuple[int, int, int] | None
    in_features: int  # columns of x
    magic: bool
    group: int  # of int4; 0 means int8

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.zero, self.bias) if t is not None)

    def matrix(self, i: int) -> PackedMatrix:
        """The second factor of projection i, a view."""
        first = sum(r * w for r, w in zip(self.rows[:i], self.widths[:i], strict=True))
        rows, width = self.rows[i], self.widths[i]
        last, own = first + rows * width, slice(sum(self.rows[:i]), sum(self.rows[: i + 1]))
        bias = None if self.bias is None else self.bias[own]
        if not self.group:
            return Int8Matrix(self.weight[first:last], self.scale[own], bias, rows, width, width, self.magic)
        groups = slice(first // self.group, last // self.group)
        zero = None if self.zero is None else self.zero[groups].view(-1, rows)
        weight, scale = self.weight[first // 4 : last // 4], self.scale[groups].view(-1, rows)
        return Int4Matrix(weight, scale, zero, bias, rows, width, width, self.group)


@dataclass(slots=True)
class HeadProjections:
    """q, k, v, each a matrix of integers or a pair of such: `first` over the residual stream, then the heads.

    Without pairs the heads read the residual stream themselves, and `first` is the same memory.
    """

    first: PackedMatrix
    heads: HeadFactors

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.first.nbytes + (0 if self.heads.starts is None else self.heads.nbytes)


def can_fuse_heads(weights: Sequence[LinearWeight]) -> bool:
    """Whether `head_projections` takes q, k and v: each a matrix of integers or a pair of such; all that read the
    residual stream of one kind, and all second factors of one kind."""
    if not all(is_packed_pair(weight) or isinstance(weight, PackedWeight) for weight in weights):
        return False
    pairs = [weight for weight in weights if isinstance(weight, LowRankWeight)]
    firsts = [weight.down if isinstance(weight, LowRankWeight) else weight for weight in weights]
    return share_a_kind(firsts) and (not pairs or share_a_kind([pair.up for pair in pairs]))


def head_projections(weights: Sequence[LinearWeight], device: torch.device, magic: bool) -> HeadProjections:
    """Lay out q, k and v, for which `can_fuse_heads` holds. Raises ValueError as `packed_factors`."""
    pairs = {i: packed_factors(weight) for i, weight in enumerate(weights) if isinstance(weight, LowRankWeight)}
    plain = {i: weight for i, weight in enumerate(weights) if isinstance(weight, PackedWeight)}
    # Pairs stand first, so that what they write starts at multiples of 128.
    firsts = [down for down, _ in pairs.values()] + list(plain.values())
    padded = [round_up(down.shape[0], PAD) for down, _ in pairs.values()]
    first = packed_matrix(firsts, device, magic, padded + [weight.shape[0] for weight in plain.values()])
    rows = _three(weight.shape[0] for weight in weights)
    if not pairs:
        return HeadProjections(first, _as_heads(first, rows))
    starts, start = {}, 0
    for i, weight in zip([*pairs, *plain], firsts, strict=True):
        starts[i] = start
        start += round_up(weight.shape[0], PAD) if i in pairs else weight.shape[0]
    seconds = _second_factors({i: up for i, (_, up) in pairs.items()}, device, magic)
    heads = _stacked(seconds, rows, _three(starts[i] for i in range(3)), first.rows)
    return HeadProjections(first, heads)


def _as_heads(first: PackedMatrix, rows: tuple[int, int, int]) -> HeadFactors:
    """The heads themselves read the residual stream."""
    widths, group = _three([first.width] * 3), first.group if isinstance(first, Int4Matrix) else 0
    zero = first.zero if isinstance(first, Int4Matrix) else None
    magic = isinstance(first, Int8Matrix) and first.magic
    return HeadFactors(first.weight, first.scale, zero, first.bias, rows, widths, None, first.in_features, magic, group)


def _second_factors(ups: dict[int, PackedWeight], device: torch.device, magic: bool) -> dict[int, PackedMatrix]:
    """Second factors by projection, those of int4 in groups of one size and all with zero points or none."""
    int4 = [up for up in ups.values() if isinstance(up, Int4Weight)]
    if not int4:
        return {i: packed_matrix([up], device, magic) for i, up in ups.items()}
    group, zeros = min(kernel_group(up) for up in int4), any(up.zero is not None for up in int4)
    return {i: int4_matrix([up], device, group=group, zeros=zeros) for i, up in zip(ups, int4, strict=True)}


def _stacked(
    seconds: dict[int, PackedMatrix], rows: tuple[int, int, int], starts: tuple[int, int, int], in_features: int
) -> HeadFactors:
    matrices, device = list(seconds.values()), next(iter(seconds.values())).weight.device
    int4 = [matrix for matrix in matrices if isinstance(matrix, Int4Matrix)]
    scales = [matrix.scale.view(-1) for matrix in int4] or [
        seconds[i].scale if i in seconds else torch.ones(n, device=device) for i, n in enumerate(rows)
    ]
    biases = [bias if i in seconds and (bias := seconds[i].bias) is not None else torch.zeros(n, device=device)
              for i, n in enumerate(rows)]  # fmt: skip
    zeros = [matrix.zero.view(-1) for matrix in int4 if matrix.zero is not None]
    return HeadFactors(
        weight=torch.cat([matrix.weight for matrix in matrices]),
        scale=torch.cat(scales),
        zero=torch.cat(zeros) if zeros else None,
        bias=torch.cat(biases) if any(matrix.bias is not None for matrix in matrices) else None,
        rows=rows,
        widths=_three(seconds[i].width if i in seconds else 0 for i in range(3)),
        starts=starts,
        in_features=in_features,
        magic=any(matrix.magic for matrix in matrices if isinstance(matrix, Int8Matrix)),
        group=int4[0].group if int4 else 0,
    )


def _three(values: Iterable[int]) -> tuple[int, int, int]:
    a, b, c = values
    return a, b, c
