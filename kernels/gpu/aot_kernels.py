"""Which kernels are compiled ahead of time, with which argument types and compile-time constants.

The constants are those the launchers would choose for LLaMA-like shapes (head size 128, page of 16 tokens): taken
from the same tables (`configs`), so that a change there is compiled too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.gpu.configs import (
    FEW_ROWS,
    SPLIT_LEN,
    Product,
    TileConfig,
    decode_config,
    int4_block_k,
    kernel_name,
    prefill_config,
    tile_config,
)
from kernels.gpu.decode_attention import decode_attention_kernel
from kernels.gpu.embedding import embedding_kernel, int4_embedding_kernel
from kernels.gpu.gate_up import gate_up_silu_kernel, silu_mul_kernel
from kernels.gpu.head_linear import head_linear_kernel
from kernels.gpu.heads import transform_heads_kernel
from kernels.gpu.int8_prefill import int8_rows_linear_kernel, quantize_rows_kernel
from kernels.gpu.norm import rms_norm_kernel
from kernels.gpu.packed_linear import packed_linear_kernel
from kernels.gpu.prefill_attention import prefill_attention_kernel

_DTYPES = {"*fp16": torch.float16, "*bf16": torch.bfloat16}
_ROWS = (1, 16, 32, 64, 128)  # one per entry of the tile tables
_HEAD_DIM = 128
_PAGE = 16
_CACHE_STRIDES = ("slot_stride", "head_stride")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One compilation: a type per run-time argument, a value per compile-time one."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]  # integer arguments known to be multiples of 16
    options: Mapping[str, int]
    core: bool  # compiled in the short run: each kernel, not each tile


def kernel_specs(arch: int) -> list[KernelSpec]:
    """All compilations of one architecture, for fp16 and bf16."""
    return [spec for pointer in _DTYPES for spec in _specs(pointer, arch)]


def _specs(activation: str, arch: int) -> Iterator[KernelSpec]:
    dtype = _DTYPES[activation]
    magic = dtype == torch.float16
    weight = "*u8" if magic else "*i8"
    for weights in _weights(magic):
        yield from _products(activation, dtype, arch, weights)
    tile = tile_config("int8_rows", 512, 4096, 4096, dtype, arch)
    constants = {"HAS_BIAS": False, "ADD": True, "MAGIC": magic, "GROUP_M": 8}
    yield _tiled(
        "int8_rows_linear m512", int8_rows_linear_kernel, activation, {"x": "*i8", "step": "*fp32", "weight": weight},
        constants, tile, ("N", "K"), core=True,
    )  # fmt: skip
    yield _spec(
        "quantize_rows", quantize_rows_kernel, activation, {"values": "*i8", "step": "*fp32"},
        {"NORM": True, "BLOCK": 16384}, 16, aligned=("n", "width", "x_stride"),
    )  # fmt: skip
    yield _spec(
        "silu_mul", silu_mul_kernel, activation, {}, {"BLOCK": 1024}, 4, aligned=("n", "gate_stride", "up_stride")
    )
    yield _spec("rms_norm", rms_norm_kernel, activation, {}, {"BLOCK": 4096}, 8, aligned=("n",))
    yield _spec(
        "embedding", embedding_kernel, activation, {"weight": weight, "token_ids": "*i64"},
        {"MAGIC": magic, "BLOCK": 1024}, 4, aligned=("n", "stride"),
    )  # fmt: skip
    yield _spec(
        "int4_embedding", int4_embedding_kernel, activation, {"weight": "*i16", "scale": "*fp16", "token_ids": "*i64"},
        {"GROUP": 128, "ZERO": True, "BK": 128, "BLOCK": 1024}, 4, aligned=("n", "stride", "rows"),
    )  # fmt: skip
    core_cache = "16-bit" if magic else "int8"  # the short run takes one kind of cache per dtype
    for kind, cache in _caches(activation).items():
        int8 = kind == "int8"
        yield _spec(
            f"transform_heads {kind}", transform_heads_kernel, activation, cache,
            _head_constants(int8) | {"ROWS": 4}, 4, aligned=("q_stride", "k_stride", "v_stride", *_CACHE_STRIDES),
            core=kind == core_cache,
        )  # fmt: skip
        yield from _attention(activation, dtype, kind, cache, int8, core=kind == core_cache)


@dataclass(frozen=True, slots=True)
class _Weights:
    """One kind of weights as the products take them."""

    name: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]

    def tile(self, product: Product, rows: int, n: int, k: int, dtype: torch.dtype, arch: int) -> TileConfig:
        group = self.constants["GROUP"]
        block_k = int4_block_k(group) if group else None
        return tile_config(kernel_name(product, group), rows, n, k, dtype, arch, block_k)


def _weights(magic: bool) -> Iterator[_Weights]:
    int8 = {"weight": "*u8" if magic else "*i8"}
    common: dict[str, Any] = {"HAS_BIAS": False, "UPCAST": False}
    yield _Weights("int8", int8, common | {"MAGIC": magic, "GROUP": 0, "ZERO": False})
    int4 = {"weight": "*i16", "scale": "*fp16"}
    for group in (128, 32):  # with the fewest and with the most sums per step
        yield _Weights(f"int4 g{group}", int4, common | {"MAGIC": False, "GROUP": group, "ZERO": True})


def _products(activation: str, dtype: torch.dtype, arch: int, weights: _Weights) -> Iterator[KernelSpec]:
    sizes, types, common = ("N", "K", "x_stride", "out_stride", "k_valid"), weights.types, weights.constants
    usual = common["GROUP"] != 32  # of other groups the short run takes one kernel
    for rows in _ROWS:
        decode = rows <= 64
        plain = {"GROUP_M": 8, "MASK_K": False}
        products: tuple[tuple[str, Product, int, int, dict[str, bool]], ...] = (
            ("norm", "normed", 3072, 4096, {"NORM": True, "ADD": False}),  # first factors of q, k, v
            ("add", "linear", 4096, 10496, {"NORM": False, "ADD": True}),  # down
        )
        for name, product, n, k, flags in products:
            if decode or name == "add":
                tile = weights.tile(product, rows, n, k, dtype, arch)
                constants = {**common, **plain, **flags, "SPLIT_K": tile.split_k}
                label = f"packed_linear {weights.name} {name} m{rows}"
                core = rows == 1 or (rows == 128 and usual)
                yield _tiled(label, packed_linear_kernel, activation, types, constants, tile, sizes, core)
        tile = weights.tile("gate_up", rows, 11008, 4096, dtype, arch)
        constants = {**common, "NORM": decode, "MASK_K": False}
        label = f"gate_up {weights.name} m{rows}"
        yield _tiled(
            label, gate_up_silu_kernel, activation, types, constants, tile, sizes[:3] + sizes[4:], usual and rows == 64
        )
        if decode:
            yield from _heads(activation, dtype, arch, rows, weights)
    if not common["GROUP"]:  # the second factor of a correction of small rank
        tile = weights.tile("linear", 1, 4096, 32, dtype, arch)
        constants = {**common, "GROUP_M": 8, "MASK_K": False, "NORM": False, "ADD": True, "SPLIT_K": 1}
        label = "packed_linear int8 narrow m1"
        yield _tiled(label, packed_linear_kernel, activation, types, constants, tile, sizes, core=False)
    tile = weights.tile("normed", 1, 4096, 4096, dtype, arch)
    masked = {**common, "GROUP_M": 8, "MASK_K": True, "NORM": True, "ADD": False, "SPLIT_K": tile.split_k}
    label = f"packed_linear {weights.name} masked m1"
    yield _tiled(label, packed_linear_kernel, activation, types, masked, tile, sizes[:4], core=False)


def _heads(activation: str, dtype: torch.dtype, arch: int, rows: int, weights: _Weights) -> Iterator[KernelSpec]:
    for name, width, flags in (
        ("dense", 4096, {"NORM": True, "CHAINED": False, "Q_NORM": True, "K_NORM": True}),
        ("factors", 1024, {"NORM": False, "CHAINED": True, "Q_NORM": False, "K_NORM": False}),
    ):
        tile = weights.tile("heads", rows, 6144, width, dtype, arch)
        for kind, cache in _caches(activation).items():
            constants = {**weights.constants, **_head_constants(kind == "int8"), **flags, "MASK_K": False, "ROWS": 16}
            yield _tiled(
                f"head_linear {weights.name} {name} {kind} cache m{rows}", head_linear_kernel, activation,
                {**weights.types, **cache}, constants | {"SPLIT_K": tile.split_k}, tile,
                ("x_stride", "k_valid", "k0", "k1", "k2", "x0", "x1", "x2", *_CACHE_STRIDES),
                core=rows == 1 and kind == "int8" and weights.constants["GROUP"] != 32,
            )  # fmt: skip


def _caches(activation: str) -> dict[str, dict[str, str]]:
    pointers = {"16-bit": activation, "int8": "*i8"}
    return {kind: {"k_cache": pointer, "v_cache": pointer, "slots": "*i64"} for kind, pointer in pointers.items()}


def _head_constants(int8: bool) -> dict[str, Any]:
    half = _HEAD_DIM // 2
    return {"Q_NORM": True, "K_NORM": True, "INT8": int8, "HALF": half, "HALF_PAD": half}


def _attention(
    activation: str, dtype: torch.dtype, kind: str, cache: dict[str, str], int8: bool, core: bool
) -> Iterator[KernelSpec]:
    common: dict[str, Any] = {"PAGE": _PAGE, "D": _HEAD_DIM, "D_PAD": _HEAD_DIM, "INT8": int8, "UPCAST": False}
    aligned = ("q_stride", "slot_stride", "head_stride", "num_q_heads", "num_kv_heads")
    tile = decode_config(1, _HEAD_DIM)
    yield _spec(
        f"decode_attention {kind}", decode_attention_kernel, activation, cache,
        common | {"GROUP": 4, "ROWS": tile.block_rows, "BLOCK": tile.block_len, "SPLIT": SPLIT_LEN, "MERGE": 16,
                  "WINDOWED": int8, "DIRECT": False},
        tile.num_warps, tile.num_stages, aligned, core=core,
    )  # fmt: skip
    tile = prefill_config(4, _HEAD_DIM, dtype)
    yield _spec(
        f"prefill_attention {kind}", prefill_attention_kernel, activation, cache,
        common | {"GROUP": 4, "ROWS": tile.block_rows, "BLOCK": tile.block_len, "WINDOWED": int8},
        tile.num_warps, tile.num_stages, aligned, core=core,
    )  # fmt: skip


def _tiled(
    name: str, kernel: Any, activation: str, types: Mapping[str, str], constants: Mapping[str, Any], tile: TileConfig,
    aligned: Iterable[str], core: bool,
) -> KernelSpec:  # fmt: skip
    blocks = {"BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k}
    if "SM" in kernel.arg_names:
        blocks["SM"] = FEW_ROWS if name.endswith(" m1") else tile.block_m
    return _spec(
        name, kernel, activation, types, {**constants, **blocks}, tile.num_warps, tile.num_stages, aligned, core
    )


_FLOAT32 = {"scale", "bias", "cos", "sin", "k_scale", "v_scale", "partial", "partial_lse"}
_BYTES = {"zero"}
_INT32 = {"block_tables", "context_lens", "query_starts", "counters"}
_FLOAT_SCALARS = {"eps", "q_eps", "k_eps", "scale_log2"}
_ACTIVATIONS = {"x", "q", "k", "v", "q_out", "out", "gate", "up", "weight", "norm_weight", "q_norm", "k_norm", "gains"}


def _spec(
    name: str,
    kernel: Any,
    activation: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 3,
    aligned: Iterable[str] = (),
    core: bool = True,
) -> KernelSpec:
    """Types not given follow from the names of arguments, which mean the same in every kernel."""
    resolved = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in types:
            resolved[argument] = types[argument]
        elif argument in _FLOAT32:
            resolved[argument] = "*fp32"
        elif argument in _BYTES:
            resolved[argument] = "*u8"
        elif argument in _INT32:
            resolved[argument] = "*i32"
        elif argument in _FLOAT_SCALARS:
            resolved[argument] = "fp32"
        elif argument in _ACTIVATIONS:
            resolved[argument] = activation
        else:
            resolved[argument] = "i32"
    return KernelSpec(
        f"{name} {activation[1:]}", kernel, resolved, constants, frozenset(aligned),
        {"num_warps": num_warps, "num_stages": num_stages}, core,
    )  # fmt: skip
