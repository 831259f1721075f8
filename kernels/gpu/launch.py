"""What every launch of a product needs to know about its device: tiles, the workspace, the counters.

Nothing here waits for the device. Workspaces come from torch's allocator at each call, so a CUDA graph keeps its own;
the counters are one small buffer, zero between launches (see `primitives.arrive_last`), so launches that use it must
follow each other on one stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.configs import (
    FEW_ROWS,
    MULTIPROCESSORS,
    Product,
    TileConfig,
    int4_block_k,
    kernel_name,
    tile_config,
)
from kernels.gpu.layout import PackedMatrix

_NUM_COUNTERS = 65536  # units of work (tiles, heads) of one launch that programs may share: 256 KB


@dataclass(slots=True)
class GpuContext:
    """One device with the dtype of activations on it; `arch` 90 means sm_90, 0 Triton's interpreter."""

    device: torch.device
    dtype: torch.dtype
    arch: int
    counters: Tensor  # int32, zeros between launches

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> GpuContext:
        """Look the device up; a CPU means the interpreter."""
        return cls(device, dtype, _architecture(device), torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device))

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self.arch == 0

    def tile(self, product: Product, rows: int, n: int, k: int, group: int = 0) -> TileConfig:
        """The configured tile, see `configs.tile_config`; `group` of int4 weights, 0 means int8."""
        block_k = int4_block_k(group) if group else None
        return tile_config(kernel_name(product, group), rows, n, k, self.dtype, self.arch, block_k)

    def int8_rows_tile(self, rows: int, n: int, k: int) -> TileConfig:
        """The configured tile of int8 activations times int8 weights."""
        return tile_config("int8_rows", rows, n, k, self.dtype, self.arch)

    def partials(self, count: int) -> Tensor:
        """Workspace of `count` float32, not initialized."""
        return torch.empty(count, dtype=torch.float32, device=self.device)

    def num_splits(self, tile: TileConfig, tiles: int) -> int:
        """How many programs share the K of each of `tiles` tiles: 1 where the counters do not suffice."""
        return tile.split_k if tiles <= _NUM_COUNTERS else 1


def _architecture(device: torch.device) -> int:
    """The newest architecture of the tables that is not newer than the device; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in MULTIPROCESSORS if arch <= 10 * major + minor), default=min(MULTIPROCESSORS))


def check_input(x: Tensor, matrix: PackedMatrix) -> None:
    """Raises ValueError unless x is [T, in] with dense rows."""
    if x.shape[1] != matrix.in_features or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; [T, {matrix.in_features}] with dense rows is needed")


def masks_k(x: Tensor, matrix: PackedMatrix) -> bool:
    """Whether loads must stop at x's width: not where its rows are padded with zeros to the matrix's."""
    return x.shape[1] != matrix.width and x.stride(0) != matrix.width


def square_rows(tile: TileConfig, num_rows: int) -> int:
    """Rows whose squares a folded norm sums: a few where few exist, else the whole tile (`product.add_squares`)."""
    return FEW_ROWS if num_rows <= FEW_ROWS else tile.block_m
