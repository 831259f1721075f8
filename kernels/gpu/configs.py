"""Tile sizes by number of rows, dtype and architecture: a plain table, chosen once per call on the host.

Not an autotuner: results of a run do not depend on timings, nothing is measured when the server starts, and the
table works in Triton's interpreter, where autotuning cannot. Shared memory per block: 163 KB on sm_80, 99 KB on
sm_86 and sm_89, 227 KB on sm_90; every entry fits the smallest (the compile test checks it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAD = 128  # K, ranks and MLP widths are padded to this when loaded: rows stay 16-byte aligned, the inner loop unmasked
SPLIT_LEN = 256  # tokens per split of decode attention; fixed, so that a result does not depend on the rest of a batch
MIN_DOT_ROWS = 16  # rows of the smallest tensor-core tile


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile [block_m, block_n] of the output, step block_k along the reduction."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_INT8_LINEAR = (  # (rows up to, tile): few rows are bound by memory and want many programs, many rows want big tiles
    (16, TileConfig(16, 32, 128, 4, 4)),
    (32, TileConfig(32, 64, 128, 4, 3)),
    (64, TileConfig(64, 64, 128, 4, 3)),
    (None, TileConfig(128, 128, 64, 8, 3)),
)
_GATE_UP = (  # two accumulators and two weight tiles
    (16, TileConfig(16, 32, 128, 4, 4)),
    (32, TileConfig(32, 64, 128, 4, 2)),
    (64, TileConfig(64, 64, 64, 4, 3)),
    (None, TileConfig(128, 64, 64, 8, 3)),
)
_FLOAT32 = TileConfig(32, 64, 64, 4, 2)  # exact, slow: for checks, not for serving
_INTERPRETED = TileConfig(64, 128, 128, 4, 1)  # the interpreter pays per operation, not per element


def int8_linear_config(num_rows: int, dtype: torch.dtype, interpreted: bool) -> TileConfig:
    """Tile of the int8 GEMM for an input of `num_rows` rows."""
    return _choose(_INT8_LINEAR, num_rows, dtype, interpreted)


def gate_up_config(num_rows: int, dtype: torch.dtype, interpreted: bool) -> TileConfig:
    """Tile of the fused gate/up projection."""
    return _choose(_GATE_UP, num_rows, dtype, interpreted)


def _choose(
    table: tuple[tuple[int | None, TileConfig], ...], num_rows: int, dtype: torch.dtype, interpreted: bool
) -> TileConfig:
    if interpreted:
        return _INTERPRETED
    if dtype == torch.float32:
        return _FLOAT32
    return next(tile for limit, tile in table if limit is None or num_rows <= limit)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """`block_rows` (token, head) rows of queries against `block_len` cached tokens at a time."""

    block_rows: int
    block_len: int
    num_warps: int
    num_stages: int


def decode_config(group: int, head_dim: int) -> AttentionConfig:
    """One token of one sequence: the `group` query heads of a key/value head, padded to a tensor-core tile."""
    rows = max(MIN_DOT_ROWS, next_power_of_2(group))
    return AttentionConfig(rows, 64 if head_dim <= 128 else 32, 4, 3 if head_dim <= 128 else 2)


def prefill_config(group: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """A chunk of one sequence: as many tokens as fit, times their `group` query heads."""
    wide = head_dim > 128 or dtype == torch.float32
    rows = max(32 if wide else 64, next_power_of_2(group))
    return AttentionConfig(rows, 32 if wide else 64, 8, 1 if dtype == torch.float32 else 2)  # 4 warps spill


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple
