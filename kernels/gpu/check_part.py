"""python -m kernels.gpu.check_part NAME: one part of `kernels.gpu_check` in its own process, rows as lines of JSON.

    python -m kernels.gpu.check_part correctness/float16/attention [--small] [--warm] [--copy TB_PER_S]

In its own process because an illegal access ends a CUDA context: whatever comes after it would fail as well. --small
takes tiny shapes (for compute-sanitizer, or Triton's interpreter on a CPU); --warm compiles and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_correctness import LLAMA, TINY, CorrectnessChecks
from kernels.gpu.check_decode import VARIANTS, measure_decoding
from kernels.gpu.check_speed import copy_bandwidth, decode_attention, int8_products, prefill_products
from kernels.gpu.check_tune import tune
from kernels.gpu.plan import LLAMA_2_7B, LLAMA_3_8B, TINY_MODEL

Row = dict[str, Any]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_GROUPS = (
    "embed", "add_linear", "attention_input", "mlp_input", "norms", "int8 prefill", "attention", "attention, window",
    "attention, int8 cache", "attention, int8 cache, window",
)  # fmt: skip
_SHAPES = {shape.name: shape for shape in (LLAMA_2_7B, LLAMA_3_8B)}
_PRODUCTS = (
    "o + residual", "o, second factor + residual", "down + residual", "o, first factor", "gate, up, SiLU",
    "first factors of q, k, v", "heads, second factors", "heads, int8 matrices", "o + residual, int4",
    "down + residual, int4", "gate, up, SiLU, int4", "heads, int4 matrices",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """How a part runs."""

    device: torch.device
    small: bool
    warm: bool  # compile only
    copy_tb_per_s: float


def parts(section: str) -> list[str]:
    """Names of the parts of a section; they are independent of each other."""
    if section == "correctness":
        return [f"correctness/{dtype}/{group}" for dtype in _DTYPES for group in _GROUPS]
    if section in ("gemm", "attention"):
        return [f"{section}/{name}" for name in _SHAPES]
    if section == "decode":
        return [f"decode/{name}/{variant}" for name in _SHAPES for variant in VARIANTS]
    if section == "tune":
        return [f"tune/{LLAMA_2_7B.name}/{product}" for product in _PRODUCTS]
    return [section]


def rows_of(part: str, settings: Settings) -> Iterator[Row]:
    """Run one part. Raises KeyError for a name that is none."""
    section, _, rest = part.partition("/")
    first, _, second = rest.partition("/")
    shape = TINY_MODEL if settings.small else _SHAPES.get(first, LLAMA_2_7B)
    if settings.warm:
        shape = replace(shape, layers=1)
    repeats = 0 if settings.warm else 5 if settings.small else 20
    if section == "environment":
        yield environment(settings.device)
    elif section == "correctness":
        checks = CorrectnessChecks(settings.device, _DTYPES[first], TINY if settings.small else LLAMA)
        for check in checks.run(second):
            yield {"ok": check.ok, "dtype": first, **asdict(check)}
    elif section == "bandwidth":
        yield copy_bandwidth(settings.device, 1 << 16 if settings.small else 1 << 30)
    elif section == "gemm":
        rows = (1, 65) if settings.small else (1, 4, 16, 64, 256)
        yield from int8_products(_ops(settings), shape, rows, settings.copy_tb_per_s, repeats)
        yield from prefill_products(_ops(settings), shape, [65] if settings.small else [256, 1024], repeats)
    elif section == "attention":
        sizes, contexts = ((1,), (20,)) if settings.small else ((1, 8), (512, 2048, 8192))
        yield from decode_attention(_ops(settings), shape, sizes, contexts, settings.copy_tb_per_s, repeats)
    elif section == "decode":
        batches, context, steps = ([1, 5], 3, 1) if settings.small else ([1, 8, 32, 64], 512, 32)
        yield from measure_decoding(_ops(settings), shape, second, batches, context, 0 if settings.warm else steps)
    elif section == "tune":
        yield from tune(_ops(settings), shape, second, min(repeats, 10))
    else:
        raise KeyError(part)


def environment(device: torch.device) -> Row:
    """Versions and GPU: what a number depends on."""
    row: Row = {
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_bytes": properties.total_memory,
        }
    return row


def _ops(settings: Settings) -> TritonOps:
    """bf16 on sm_90, fp16 elsewhere: the cheaper dequantization of each."""
    bfloat16 = settings.device.type == "cuda" and torch.cuda.get_device_capability(settings.device) >= (9, 0)
    return TritonOps(settings.device, torch.bfloat16 if bfloat16 else torch.float16)


def main(arguments: list[str] | None = None) -> int:
    """Run one part and print its rows; an exception is the exit status of Python and its traceback."""
    parser = argparse.ArgumentParser(description="One part of kernels.gpu_check.")
    parser.add_argument("part")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--copy", type=float, default=float("nan"), help="TB/s of the copy that rates are shares of")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in rows_of(options.part, Settings(device, options.small, options.warm, options.copy)):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
