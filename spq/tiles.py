"""Ranks and widths in whole tiles of the kernels. Not the kernels' own padding (`kernels`): what is stored."""

from __future__ import annotations


def tile_multiple(dim: int, asked: int | None) -> int:
    """What a dimension is rounded up to: the multiple asked for, or the tile that suits its size.

    Kernels work in tiles of 64 (tensor cores) or 8-32 (AVX2), so a rank of 819 costs as much as 832. On small
    matrices a tile of 64 would eat the whole saving: auto takes the largest of 64, 32, 16, 8 that is at most 1/32
    of the dimension (64 from 2048 on), and never less than 8, so that rounding costs about 3 % at worst.
    """
    if asked is not None:
        return asked
    return max((tile for tile in (64, 32, 16) if tile * 32 <= dim), default=8)


def round_up(value: int, multiple: int, limit: int) -> int:
    """The next multiple, but at most `limit`."""
    return min(-(-value // multiple) * multiple, limit)
