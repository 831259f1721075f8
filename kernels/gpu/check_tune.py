"""Times alternatives to the configured tile of each product, for a person to copy the best into `configs.MEASURED`.

Not an autotuner: nothing of this runs in the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker
from kernels.gpu.check_products import ProductCase, product_cases
from kernels.gpu.check_speed import cold_copies, seconds_per_call
from kernels.gpu.configs import MULTIPROCESSORS, ROW_BUCKETS, TileConfig, kernel_name
from kernels.gpu.plan import ModelShape

_REPEATS = 10
_MAX_CANDIDATES = 12
_SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes per block


def candidates(case: ProductCase, rows: int, current: TileConfig, arch: int) -> list[TileConfig]:
    """A small grid around what keeps one to four programs on each multiprocessor; `current` stands first."""
    wanted = 2 * MULTIPROCESSORS[arch]
    grid: list[tuple[float, TileConfig]] = []
    for block_n in (16, 32, 64, 128):
        for split in (1, 2, 3, 4, 6, 8) if case.kernel != "gate_up" else (1,):
            for block_k, stages in ((128, 3), (128, 5), (128, 7) if case.group else (256, 3)):
                for warps in (2, 4) if block_n <= 32 else (4, 8):
                    tile = TileConfig(current.block_m, block_n, block_k, warps, stages, split)
                    programs = -(-rows // tile.block_m) * -(-case.n // block_n) * split
                    if _fits(case, tile, arch) and wanted / 2 <= programs <= 4 * wanted:
                        grid.append((abs(programs - wanted) / wanted + 0.01 * stages, tile))
    best = [tile for _, tile in sorted(grid, key=lambda entry: entry[0]) if tile != current]
    spread = max(1, len(best) // (2 * _MAX_CANDIDATES))  # neighbours in the order differ little
    return [current, *best[::spread][: _MAX_CANDIDATES - 1]]


def _fits(case: ProductCase, tile: TileConfig, arch: int) -> bool:
    matrices = 2 if case.kernel == "gate_up" else 1
    stage = (2 * tile.block_m + matrices * tile.block_n) * tile.block_k
    steps = case.k // tile.block_k // tile.split_k
    return stage * tile.num_stages <= _SHARED_LIMIT[arch] and case.k % tile.block_k == 0 and steps >= 2


def tune(ops: TritonOps, shape: ModelShape, name: str, repeats: int = _REPEATS) -> Iterator[dict[str, Any]]:
    """One row per class of rows of one product: the configured tile, the best one and both times. A tile that does
    not compile or run is counted, not fatal."""
    make, arch = Maker(ops.device), ops.gpu.arch or 90
    case = next(case for case in product_cases(ops, shape) if case.name == name)
    copies = cold_copies(case.prepare, ops.nbytes)
    for bucket in ROW_BUCKETS:
        rows = 1 if bucket == ROW_BUCKETS[0] else bucket
        x = make.normal(rows, case.inputs, dtype=ops.dtype)
        current, timed, failed = ops.gpu.tile(case.kernel, rows, case.n, case.k, case.group), [], []
        for tile in candidates(case, rows, current, arch):
            try:
                seconds = seconds_per_call([partial(case.run, c, x, tile) for c in copies], ops.device, repeats)
                timed.append((seconds, tile))
            except Exception as error:  # too many registers or too much shared memory: the next one
                failed.append(f"{tile}: {type(error).__name__}: {error}"[:200])
        seconds, tile = min(timed, key=lambda entry: entry[0])
        yield {
            "model": shape.name, "name": name, "kernel": kernel_name(case.kernel, case.group),
            "arch": arch, "rows_up_to": bucket, "n": case.n,
            "k": case.k, "us": seconds * 1e6, "configured_us": timed[0][0] * 1e6, "gain": timed[0][0] / seconds,
            "tile": asdict(tile), "configured": asdict(current), "tried": len(timed), "failed": failed,
            "tb_per_s": case.weight_bytes / seconds / 1e12,
        }  # fmt: skip
