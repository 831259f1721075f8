"""Which kernels are compiled ahead of time, with which argument types and compile-time constants.

The constants are those the launchers would choose for LLaMA-like shapes (head size 128, page of 16 tokens): taken
from the same tables (`configs`), so that a change there is compiled too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.gpu.configs import SPLIT_LEN, decode_config, gate_up_config, int8_linear_config, prefill_config
from kernels.gpu.decode_attention import decode_attention_kernel, merge_splits_kernel
from kernels.gpu.embedding import embedding_kernel
from kernels.gpu.gate_up import gate_up_silu_kernel, silu_mul_kernel
from kernels.gpu.int8_linear import int8_linear_kernel
from kernels.gpu.norm import rms_norm_kernel
from kernels.gpu.prefill_attention import prefill_attention_kernel
from kernels.gpu.rotary_store import rotary_store_kernel

_DTYPES = {"*fp16": torch.float16, "*bf16": torch.bfloat16}
_ROWS = (16, 32, 64, 128)  # one per entry of the tile tables
_HEAD_DIM = 128
_PAGE = 16


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


def kernel_specs() -> list[KernelSpec]:
    """All compilations of one architecture, for fp16 and bf16."""
    return [spec for pointer in _DTYPES for spec in _specs(pointer)]


def _specs(activation: str) -> Iterator[KernelSpec]:
    dtype = _DTYPES[activation]
    magic = dtype == torch.float16
    weight = "*u8" if magic else "*i8"
    for rows in _ROWS:
        yield _linear(activation, weight, magic, rows, chained=False, mask_k=False, core=rows == 128)
    yield _linear(activation, weight, magic, 16, chained=False, mask_k=True, core=False)
    yield _linear(activation, weight, magic, 16, chained=True, mask_k=False, core=True)
    for rows in _ROWS:
        tile = gate_up_config(rows, dtype, interpreted=False)
        constants: dict[str, Any] = {"HAS_BIAS": False, "MASK_K": False, "MAGIC": magic, "UPCAST": False}
        constants |= {"BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k}
        yield _spec(
            f"gate_up m{rows}", gate_up_silu_kernel, activation, {"weight": weight}, constants, tile.num_warps,
            tile.num_stages, ("N", "K", "x_stride", "k_valid"), core=rows == 64,
        )  # fmt: skip
    yield _spec("silu_mul", silu_mul_kernel, activation, {}, {"BLOCK": 1024}, 4)
    yield _spec("add_rms_norm", rms_norm_kernel, activation, {}, {"ADD": True, "BLOCK": 4096}, 8, aligned=("n",))
    yield _spec(
        "embedding", embedding_kernel, activation, {"weight": weight, "token_ids": "*i64"},
        {"MAGIC": magic, "BLOCK": 1024}, 4, aligned=("n", "stride"),
    )  # fmt: skip
    core_cache = "16-bit" if magic else "int8"  # the short run takes one kind of cache per dtype
    cache = {"16-bit": activation, "int8": "*i8"}
    for kind, pointer in cache.items():
        int8 = kind == "int8"
        types = {"k_cache": pointer, "v_cache": pointer}
        yield _spec(
            f"rotary_store {kind}", rotary_store_kernel, activation, types | {"slots": "*i64"},
            {"HALF": _HEAD_DIM // 2, "BLOCK": _HEAD_DIM // 2, "INT8": int8}, 1,
            aligned=("q_stride", "k_stride", "v_stride", "slot_stride", "head_stride"),
            core=kind == core_cache,
        )  # fmt: skip
        yield from _attention(activation, dtype, kind, types, int8, core=kind == core_cache)
    yield _spec(
        "merge_splits", merge_splits_kernel, activation, {},
        {"D": _HEAD_DIM, "D_PAD": _HEAD_DIM, "SPLIT": SPLIT_LEN, "BLOCK": 16}, 2,
    )  # fmt: skip


def _linear(
    activation: str, weight: str, magic: bool, rows: int, chained: bool, mask_k: bool, core: bool
) -> KernelSpec:
    tile = int8_linear_config(rows, _DTYPES[activation], interpreted=False)
    constants: dict[str, Any] = {
        "HAS_BIAS": chained,
        "MASK_K": mask_k,
        "CHAINED": chained,
        "GROUPS": 3 if chained else 1,
    }
    constants |= {"MAGIC": magic, "UPCAST": False, "GROUP_M": 8}
    constants |= {"BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k}
    aligned = ["x_stride", "n0", "n1", "n2", "k0", "k1", "k2", "x0", "x1", "x2"] + ([] if mask_k else ["k_valid"])
    name = f"int8_linear m{rows}" + (" chained" if chained else "") + (" masked" if mask_k else "")
    return _spec(
        name, int8_linear_kernel, activation, {"weight": weight}, constants, tile.num_warps, tile.num_stages, aligned,
        core=core,
    )  # fmt: skip


def _attention(
    activation: str, dtype: torch.dtype, kind: str, cache: dict[str, str], int8: bool, core: bool
) -> Iterator[KernelSpec]:
    common: dict[str, Any] = {"PAGE": _PAGE, "D": _HEAD_DIM, "D_PAD": _HEAD_DIM, "INT8": int8, "UPCAST": False}
    aligned = ("q_stride", "slot_stride", "head_stride", "num_q_heads", "num_kv_heads")
    tile = decode_config(1, _HEAD_DIM)
    yield _spec(
        f"decode_attention {kind}", decode_attention_kernel, activation, cache,
        common | {"GROUP": 4, "ROWS": tile.block_rows, "BLOCK": tile.block_len, "SPLIT": SPLIT_LEN,
                  "WINDOWED": int8, "DIRECT": False},
        tile.num_warps, tile.num_stages, aligned, core=core,
    )  # fmt: skip
    tile = prefill_config(4, _HEAD_DIM, dtype)
    yield _spec(
        f"prefill_attention {kind}", prefill_attention_kernel, activation, cache,
        common | {"GROUP": 4, "ROWS": tile.block_rows, "BLOCK": tile.block_len, "WINDOWED": int8},
        tile.num_warps, tile.num_stages, aligned, core=core,
    )  # fmt: skip


_FLOAT32 = {"scale", "bias", "cos", "sin", "k_scale", "v_scale", "partial", "partial_lse"}
_INT32 = {"block_tables", "context_lens", "query_starts"}
_FLOAT_SCALARS = {"eps", "scale_log2"}
_ACTIVATIONS = {"x", "q", "k", "v", "q_out", "out", "gate", "up", "residual", "weight"}


def _spec(
    name: str,
    kernel: Any,
    activation: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 3,
    aligned: tuple[str, ...] | list[str] = (),
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
