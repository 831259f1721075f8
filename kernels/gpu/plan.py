"""python -m kernels.gpu.plan: the launches of one decoder layer, with programs and bytes of each, as a Markdown table.

    python -m kernels.gpu.plan [--arch 90] [--rows 1,4,16,64] [--dtype bfloat16]

Computed from the tile tables alone, without a GPU: what a launch budget and a bandwidth are to be compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.gpu.configs import PAD, SPLIT_LEN, Kernel, next_power_of_2, round_up, tile_config


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; ranks and pruned width are those of the SPQ variant."""

    name: str
    layers: int
    hidden: int
    width: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    rank: int  # of q and o
    kv_rank: int
    pruned_width: int


# Rank 1024 halves the int8 bytes of a 4096 x 4096 projection, 512 does nearly that to 1024 x 4096 (0.62); 5 % of the
# MLP's neurons are pruned.
LLAMA_2_7B = ModelShape("LLaMA-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, 1024, 1024, 10457)
LLAMA_3_8B = ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 1024, 512, 13619)
TINY_MODEL = ModelShape("tiny", 1, 64, 40, 4, 2, 16, 50, 3, 2, 38)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel of a decode step with what it reads and writes besides activations."""

    name: str
    programs: int
    split_k: int
    weight_bytes: int
    workspace_bytes: int  # shares of programs, written once and read once


def layer_launches(
    shape: ModelShape, low_rank: bool, rows: int, arch: int, dtype: torch.dtype, context: int = 1024
) -> Iterator[Launch]:
    """The kernels of one layer in a decode step of `rows` sequences with `context` cached tokens each."""

    def product(name: str, kernel: Kernel, n: int, k: int) -> Launch:
        k = round_up(k, PAD)
        tile = tile_config(kernel, rows, n, k, dtype, arch)
        tiles_n = -(-n // tile.block_n)
        tiles = -(-rows // tile.block_m) * tiles_n
        matrices = 2 if kernel == "gate_up" else 1
        workspace = rows * tiles_n * tile.split_k * (tile.block_n + 1) * 4 if tile.split_k > 1 else 0
        return Launch(name, tiles * tile.split_k, tile.split_k, matrices * n * (k + 4), workspace)

    def heads(widths: tuple[int, int, int]) -> Launch:
        d, counts = shape.head_dim, (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
        tile = tile_config("heads", rows, sum(counts) * d, max(widths), dtype, arch)
        block_n = min(tile.block_n, max(16, next_power_of_2(d)))
        subs, tiles_m = -(-d // block_n), -(-rows // tile.block_m)
        units = sum(counts) * tiles_m
        weights = sum(count * d * (width + 4) for count, width in zip(counts, widths, strict=True))
        workspace = rows * sum(counts) * tile.split_k * (subs * block_n + 1) * 4
        return Launch("heads of q, k, v + cache", units * subs * tile.split_k, tile.split_k, weights, workspace)

    h, ranks = shape.hidden, tuple(round_up(r, PAD) for r in (shape.rank, shape.kv_rank, shape.kv_rank))
    width = round_up(shape.pruned_width if low_rank else shape.width, PAD)
    if low_rank:
        yield product("first factors of q, k, v", "normed", sum(ranks), h)
    yield heads((ranks[0], ranks[1], ranks[2]) if low_rank else (h, h, h))
    splits = -(-context // SPLIT_LEN)
    cells = rows * shape.num_q_heads * (splits if splits > 1 else 0)
    workspace = cells * (shape.head_dim + 1) * 4
    yield Launch("attention over the cache", rows * shape.num_kv_heads * splits, 1, 0, workspace)
    if low_rank:
        yield product("o, first factor", "linear", ranks[0], shape.num_q_heads * shape.head_dim)
    yield product("o + residual", "linear", h, ranks[0] if low_rank else shape.num_q_heads * shape.head_dim)
    yield product("gate, up, SiLU", "gate_up", width, h)
    yield product("down + residual", "linear", h, width)


def table(shape: ModelShape, low_rank: bool, rows: list[int], arch: int, dtype: torch.dtype) -> list[str]:
    """Lines of a Markdown table: programs (and how many share a K) by number of rows, bytes."""
    columns = [list(layer_launches(shape, low_rank, m, arch, dtype)) for m in rows]
    kind = "low rank" if low_rank else "dense int8"
    lines = [
        f"{shape.name}, {kind}, sm_{arch}: {len(columns[0])} launches a layer",
        "",
        "| kernel | " + " | ".join(f"programs, {m} rows" for m in rows) + " | weights, MB | workspace, KB |",
        "|---" * (len(rows) + 1) + "|---:|---:|",
    ]
    for launches in zip(*columns, strict=True):
        cells = [f"{x.programs}" + (f" (K in {x.split_k})" if x.split_k > 1 else "") for x in launches]
        workspace = " / ".join(f"{x.workspace_bytes / 1e3:.0f}" for x in launches)
        lines.append(
            f"| {launches[0].name} | " + " | ".join(cells) + f" | {launches[0].weight_bytes / 1e6:.2f} | {workspace} |"
        )
    total = sum(launch.weight_bytes for launch in columns[0])
    return [*lines, "| sum |" + " |" * len(rows) + f" {total / 1e6:.2f} | |", ""]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Programs and bytes of the kernels of a decode step.")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    rows = [int(m) for m in options.rows.split(",")]
    for shape in (LLAMA_2_7B, LLAMA_3_8B):
        for low_rank in (False, True):
            print("\n".join(table(shape, low_rank, rows, options.arch, getattr(torch, options.dtype))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
