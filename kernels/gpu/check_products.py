"""The products of one decoder layer as cases that are timed, with the configured tile or another.

Not the timing itself (`check_speed`, `check_tune`): only the weights, inputs and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker
from kernels.gpu.configs import DECODE_ROWS, PAD, Product, TileConfig, round_up
from kernels.gpu.gate_up import gate_up_silu
from kernels.gpu.head_layout import HeadProjections
from kernels.gpu.head_linear import head_linear
from kernels.gpu.layout import PackedMatrix
from kernels.gpu.packed_linear import packed_linear
from kernels.gpu.plan import ModelShape
from kernels.gpu.prepared import FusedGateUp
from kernels.ops import Norm
from kernels.weights import LinearWeight

_GROUP = 128  # inputs of a scale of int4


@dataclass(frozen=True, slots=True)
class ProductCase:
    """One product; n and k as `configs.tile_config` takes them, `outputs` columns in all, `inputs` of x."""

    name: str
    kernel: Product
    n: int
    k: int
    outputs: int
    inputs: int
    prepare: Callable[[], Any]
    run: Callable[[Any, Tensor, TileConfig | None], Tensor]
    group: int = 0  # of int4 weights; 0 means int8

    @property
    def weight_bytes(self) -> int:
        """Integers and scales that the product reads (int4 here has float16 scales and no zero points)."""
        per_row = self.k // 2 + 2 * (self.k // self.group) if self.group else self.k + 4
        return self.outputs * per_row

    def takes(self, rows: int) -> bool:
        """Whether the kernel serves steps of so many rows."""
        return rows <= DECODE_ROWS or self.kernel in ("linear", "gate_up")


def product_cases(ops: TritonOps, shape: ModelShape) -> Iterator[ProductCase]:
    """Every product of a layer: int8, plain and low-rank, then int4."""
    make, h = Maker(ops.device), shape.hidden
    q_width, kv_width = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # Inputs are as wide as the kernels write them: ranks and the width of the MLP padded.
    rank, width = round_up(shape.rank, PAD), round_up(shape.pruned_width, PAD)
    norm = make.norm(h, ops.dtype)

    def add(name: str, out: int, inner: int, group: int = 0) -> ProductCase:
        def run(matrix: PackedMatrix, x: Tensor, tile: TileConfig | None) -> Tensor:
            total = torch.empty(len(x), out, dtype=x.dtype, device=x.device)
            return packed_linear(ops.gpu, x, matrix, x.dtype, add_to=total, tile=tile)

        return ProductCase(
            name,
            "linear",
            out,
            round_up(inner, PAD),
            out,
            inner,
            lambda: ops.prepare_linear(make.int4(out, inner, group) if group else make.int8(out, inner)),
            run,
            group,
        )

    yield add("o + residual", h, q_width)
    yield add("o, second factor + residual", h, rank)
    yield add("down + residual", h, width)
    yield ProductCase(
        "o, first factor", "linear", rank, round_up(q_width, PAD), rank, q_width,
        lambda: ops.prepare_linear(make.int8(rank, q_width)),
        lambda matrix, x, tile: packed_linear(ops.gpu, x, matrix, x.dtype, tile=tile),
    )  # fmt: skip

    def gate_up(pair: FusedGateUp, x: Tensor, tile: TileConfig | None) -> Tensor:
        folded = norm if len(x) <= DECODE_ROWS else None
        return gate_up_silu(ops.gpu, x, pair.matrix, pair.width, norm=folded, tile=tile)

    yield ProductCase(
        "gate, up, SiLU", "gate_up", width, round_up(h, PAD), 2 * width, h,
        lambda: ops.prepare_gate_up(make.int8(width, h), make.int8(width, h)), gate_up,
    )  # fmt: skip

    low_rank: list[LinearWeight] = [
        make.low_rank(q_width, h, shape.rank), *(make.low_rank(kv_width, h, shape.kv_rank) for _ in range(2))
    ]  # fmt: skip
    plain: list[LinearWeight] = [make.int8(n, h) for n in (q_width, kv_width, kv_width)]
    firsts = rank + 2 * round_up(shape.kv_rank, PAD)
    yield ProductCase(
        "first factors of q, k, v", "normed", firsts, round_up(h, PAD), firsts, h,
        lambda: ops.prepare_qkv(*low_rank).first,  # type: ignore[union-attr]
        lambda matrix, x, tile: packed_linear(ops.gpu, x, matrix, x.dtype, norm=norm, tile=tile),
    )  # fmt: skip
    heads = q_width + 2 * kv_width
    heads_cases = (
        ("heads, second factors", low_rank, rank, firsts, None),
        ("heads, int8 matrices", plain, h, h, norm),
    )
    for name, weights, k, inputs, folded in heads_cases:
        yield ProductCase(
            name, "heads", heads, round_up(k, PAD), heads, inputs, lambda w=weights: ops.prepare_qkv(*w),  # type: ignore[misc]
            _heads(ops, make, shape, folded),
        )  # fmt: skip

    yield add("o + residual, int4", h, q_width, _GROUP)
    yield add("down + residual, int4", h, width, _GROUP)
    yield ProductCase(
        "gate, up, SiLU, int4", "gate_up", width, round_up(h, PAD), 2 * width, h,
        lambda: ops.prepare_gate_up(make.int4(width, h, _GROUP), make.int4(width, h, _GROUP)), gate_up, _GROUP,
    )  # fmt: skip
    int4: list[LinearWeight] = [make.int4(n, h, _GROUP) for n in (q_width, kv_width, kv_width)]
    yield ProductCase(
        "heads, int4 matrices", "heads", heads, round_up(h, PAD), heads, h, lambda: ops.prepare_qkv(*int4),
        _heads(ops, make, shape, norm), _GROUP,
    )  # fmt: skip


def _heads(
    ops: TritonOps, make: Maker, shape: ModelShape, norm: Norm | None
) -> Callable[[HeadProjections, Tensor, TileConfig | None], Tensor]:
    kv = make.cache(DECODE_ROWS, shape.num_kv_heads, shape.head_dim, ops.dtype)
    slots = torch.arange(DECODE_ROWS, device=ops.device)
    transforms = make.heads(DECODE_ROWS, shape.head_dim, ops.dtype)
    cos, sin = transforms.cos, transforms.sin

    def run(weight: HeadProjections, x: Tensor, tile: TileConfig | None) -> Tensor:
        transforms.cos, transforms.sin = cos[: len(x)], sin[: len(x)]
        return head_linear(ops.gpu, x, weight.heads, transforms, kv, slots[: len(x)], norm=norm, tile=tile)

    return run
