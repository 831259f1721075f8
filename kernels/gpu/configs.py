"""Tile sizes by kernel, architecture, number of rows and shape: plain tables, read once per call on the host.

Not an autotuner: results of a run do not depend on timings, nothing is measured when the server starts, and the
tables work in Triton's interpreter, where autotuning cannot. What `python -m kernels.gpu_check --sections tune` finds
best is copied into `MEASURED` by a person. Shared memory per block: 163 KB on sm_80, 99 KB on sm_86 and sm_89, 227 KB
on sm_90; every entry of the general table fits the smallest (the compile test checks it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Product = Literal["linear", "normed", "heads", "gate_up"]  # normed: the norm of the input folded in
Kernel = Literal[
    "linear", "normed", "heads", "gate_up", "int8_rows", "int4 linear", "int4 normed", "int4 heads", "int4 gate_up"
]  # fmt: skip

PAD = 128  # K, ranks and MLP widths are padded to this when loaded: rows stay 16-byte aligned, the inner loop unmasked
SPLIT_LEN = 256  # tokens per split of decode attention; fixed, so that a result does not depend on the rest of a batch
MIN_DOT_ROWS = 16  # rows of the smallest tensor-core tile
DECODE_ROWS = 64  # up to as many rows a step takes the fused decode kernels; beyond, those made for prompts
FEW_ROWS = 4  # the smallest class of rows below
MIN_STEPS = 4  # steps along K that a split of K keeps: fewer would not fill the pipeline of loads
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}  # of A100, A40, RTX 4090, H100: programs a decode kernel needs
MAX_SPLIT = 16


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile [block_m, block_n] of the output, step block_k along the reduction, which `split_k` programs share."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


# (rows up to, tile). Few rows are bound by memory: small tiles make many programs, and what a program reads of x (2 /
# block_n bytes per weight byte and row, from the L2 cache) stays below the weights themselves. Many rows are bound by
# arithmetic and want big tiles. Not measured on a GPU yet.
_Table = tuple[tuple[int | None, TileConfig], ...]
_GENERAL: dict[Kernel, _Table] = {
    "linear": (
        (4, TileConfig(16, 16, 256, 2, 5)),
        (16, TileConfig(16, 64, 128, 4, 4)),
        (32, TileConfig(32, 64, 128, 4, 3)),
        (64, TileConfig(64, 128, 128, 8, 2)),
        (None, TileConfig(128, 128, 64, 8, 3)),
    ),
    "normed": (  # norming costs a program the same for 16 columns as for 64: fewer, wider ones
        (4, TileConfig(16, 32, 128, 2, 6)),
        (16, TileConfig(16, 64, 128, 4, 4)),
        (32, TileConfig(32, 64, 128, 8, 3)),
        (64, TileConfig(64, 128, 64, 8, 3)),
    ),
    "heads": (  # one head is one unit: its columns meet again in the epilogue
        (4, TileConfig(16, 32, 128, 4, 5)),
        (16, TileConfig(16, 64, 128, 4, 4)),
        (32, TileConfig(32, 64, 128, 8, 3)),
        (64, TileConfig(64, 128, 64, 8, 3)),
    ),
    "gate_up": (  # two accumulators and two weight tiles
        (4, TileConfig(16, 32, 128, 4, 5)),
        (16, TileConfig(16, 64, 128, 4, 3)),
        (32, TileConfig(32, 64, 128, 8, 2)),
        (64, TileConfig(64, 64, 64, 8, 3)),
        (None, TileConfig(128, 64, 64, 8, 3)),
    ),
    "int8_rows": ((None, TileConfig(128, 128, 128, 8, 3)),),
    # A step of int4 takes as many inputs as its layout says (`int4_block_k`), half the bytes of int8: wider tiles and
    # more steps on the way keep as many bytes in flight. A sum per group beside the sum of all: smaller big tiles.
    "int4 linear": (
        (4, TileConfig(16, 32, 128, 2, 6)),
        (16, TileConfig(16, 64, 128, 4, 5)),
        (32, TileConfig(32, 64, 128, 4, 4)),
        (64, TileConfig(64, 64, 128, 8, 3)),
        (None, TileConfig(128, 64, 128, 8, 2)),
    ),
    "int4 normed": (
        (4, TileConfig(16, 32, 128, 2, 6)),
        (16, TileConfig(16, 64, 128, 4, 5)),
        (32, TileConfig(32, 64, 128, 8, 3)),
        (64, TileConfig(64, 64, 128, 8, 3)),
    ),
    "int4 heads": (
        (4, TileConfig(16, 32, 128, 4, 6)),  # two warps spill on sm_86 with groups of 32
        (16, TileConfig(16, 64, 128, 4, 5)),
        (32, TileConfig(32, 64, 128, 8, 3)),
        (64, TileConfig(64, 32, 128, 8, 3)),  # 64 columns spill on sm_80 with groups of 32
    ),
    "int4 gate_up": (  # 64 columns of two matrices spill on sm_80
        (4, TileConfig(16, 32, 128, 4, 5)),
        (16, TileConfig(16, 64, 128, 4, 4)),
        (32, TileConfig(32, 64, 128, 8, 3)),
        (None, TileConfig(64, 32, 128, 8, 3)),
    ),
}
_INT4: dict[Product, Kernel] = {
    "linear": "int4 linear", "normed": "int4 normed", "heads": "int4 heads", "gate_up": "int4 gate_up",
}  # fmt: skip
ROW_BUCKETS = (4, 16, 32, 64)  # the decode classes of rows above

# (kernel, architecture, rows up to, N, K) -> tile with its split: shapes that were timed. Empty until then.
MEASURED: dict[tuple[Kernel, int, int, int, int], TileConfig] = {}

_FLOAT32 = TileConfig(32, 64, 64, 4, 2)  # exact, slow: for checks, not for serving
_INTERPRETED = TileConfig(64, 128, 128, 4, 1)  # the interpreter pays per operation, not per element


def kernel_name(product: Product, group: int) -> Kernel:
    """Under which name the tiles of a product stand; `group` is that of its int4 weights, 0 means int8."""
    return _INT4[product] if group else product


def int4_block_k(group: int) -> int:
    """Inputs of one step along int4 weights: four quarters, each a group or within one, of 32 inputs or, where a group
    has 16, of 16 (the least that a tensor core takes)."""
    return PAD if group > MIN_DOT_ROWS else 4 * MIN_DOT_ROWS


def tile_config(
    kernel: Kernel, rows: int, n: int, k: int, dtype: torch.dtype, arch: int, block_k: int | None = None
) -> TileConfig:
    """Tile of a product of `rows` rows with a matrix [n, k]; `arch` 80 means sm_80, 0 the interpreter.

    n counts the columns of one matrix for "gate_up", of all heads for "heads"; int4 weights fix `block_k`.
    """
    if arch == 0:
        tile, split = _INTERPRETED, 2 if rows <= DECODE_ROWS and not kernel.endswith("gate_up") and k > PAD else 1
        return replace(tile, split_k=split, block_k=block_k or _step(tile, k))
    if dtype == torch.float32 and kernel != "int8_rows":
        return replace(_FLOAT32, block_k=block_k or _step(_FLOAT32, k))
    bucket = next((limit for limit in ROW_BUCKETS if rows <= limit), 0)
    found = MEASURED.get((kernel, arch, bucket, n, k))
    if found is not None:
        return found
    tile = next(tile for limit, tile in _GENERAL[kernel] if limit is None or rows <= limit)
    tile = replace(tile, block_k=block_k or _step(tile, k))
    spread = rows <= DECODE_ROWS and not kernel.endswith("gate_up") and kernel != "int8_rows"
    return _spread(tile, n, k, MULTIPROCESSORS[arch]) if spread else tile


def _step(tile: TileConfig, k: int) -> int:
    """The tile's own, or less where K, a multiple of 128 or a power of two, is no multiple of it."""
    return tile.block_k if k % tile.block_k == 0 else min(PAD, k & -k)


def _spread(tile: TileConfig, n: int, k: int, programs: int) -> TileConfig:
    """Split K, and halve block_n where that is not enough, until there are as many programs as multiprocessors."""
    most = min(MAX_SPLIT, max(1, k // (MIN_STEPS * tile.block_k)))
    block_n = tile.block_n
    while True:
        tiles = -(-n // block_n)
        split = min(most, -(-programs // tiles))
        if tiles * split >= programs or block_n <= 16:
            return replace(tile, block_n=block_n, split_k=split, num_warps=tile.num_warps if block_n > 16 else 2)
        block_n //= 2


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
