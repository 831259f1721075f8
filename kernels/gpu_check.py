"""python -m kernels.gpu_check: on a machine with a GPU, are the Triton kernels right, and how fast are they?

    python -m kernels.gpu_check [--out FILE.json] [--quick]

Compares every operation with the reference in float64, measures copy bandwidth, int8 products, decode attention and
a decoder of random weights in LLaMA-2-7B's shape. Exit status 0 when all is right, 1 when a check fails or a part
breaks (the others still run), 2 without a CUDA device. Prints tables; writes one JSON file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.ops import BackendName

_BACKEND: BackendName = "triton"
_GIB = 1 << 30
Row = dict[str, Any]


class Report:
    """Results by section; a section that raises is recorded and does not stop the others."""

    def __init__(self) -> None:
        self.sections: dict[str, Row] = {}
        self.ok = True

    def section(self, name: str, rows: Callable[[], Iterable[Row]]) -> list[Row]:
        """Run one section and print its rows as they come; a row with "ok": False fails the whole run."""
        print(f"\n== {name}", flush=True)
        done: list[Row] = []
        self.sections[name] = {"rows": done}
        try:
            for row in rows():
                done.append(row)
                print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
                self.ok &= bool(row.get("ok", True))
        except Exception:  # recorded, so that one broken part does not lose the others
            self.sections[name]["error"] = traceback.format_exc()[-3000:]
            print(self.sections[name]["error"], flush=True)
            self.ok = False
        return done


def correctness(device: torch.device, dtypes: Iterable[torch.dtype], tiny: bool = False) -> Iterable[Row]:
    """One row per operation, shape and dtype: relative error, its bound, the verdict."""
    from kernels.gpu.check_correctness import LLAMA, TINY, CorrectnessChecks

    for dtype in dtypes:
        for check in CorrectnessChecks(device, dtype, TINY if tiny else LLAMA).run():
            yield {"ok": check.ok, "dtype": str(dtype).removeprefix("torch."), **asdict(check)}


def decoding(
    device: torch.device, dtype: torch.dtype, variant: str, tiny: bool = False, steps: int = 32
) -> Iterable[Row]:
    """Rows of one variant ("float", "int8", "spq") at batch 1 and 8; not finite logits fail."""
    from kernels.gpu.backend import TritonOps
    from kernels.gpu.check_decode import LLAMA_2_7B, TINY_MODEL, measure_decoding

    shape, context = (TINY_MODEL, 3) if tiny else (LLAMA_2_7B, 512)
    for row in measure_decoding(TritonOps(device, dtype), shape, variant, (1, 8), context, steps):
        yield {"ok": row["finite"], **row}


def environment(device: torch.device) -> Row:
    """Date, versions, GPU, driver and commit: what a number depends on."""
    row: Row = {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain")),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return row


def run(device: torch.device, quick: bool) -> Report:
    """All sections on a CUDA device; `quick` takes fewer shapes and no decoder."""
    from kernels.gpu.backend import TritonOps
    from kernels.gpu.check_decode import LLAMA_2_7B, VARIANTS
    from kernels.gpu.check_speed import copy_bandwidth, decode_attention, int8_products

    report = Report()
    report.section("environment", lambda: [environment(device)])
    for dtype in (torch.float16, torch.bfloat16):
        report.section(f"correctness {dtype}", lambda dtype=dtype: correctness(device, [dtype]))  # type: ignore[misc]
    copied = report.section("copy bandwidth", lambda: [copy_bandwidth(device)])
    rate = copied[0]["tb_per_s"] if copied else float("nan")
    major, _ = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if major >= 9 else torch.float16  # the cheaper dequantization of each
    ops = TritonOps(device, dtype)
    rows, contexts = ((1, 16), (2048,)) if quick else ((1, 4, 16, 64, 256), (512, 2048, 8192))
    report.section(f"int8 products {dtype}", lambda: int8_products(ops, LLAMA_2_7B, rows, rate))
    sizes = (1,) if quick else (1, 8)
    report.section(f"decode attention {dtype}", lambda: decode_attention(ops, LLAMA_2_7B, sizes, contexts, rate))
    for variant in () if quick else VARIANTS:
        report.section(f"decoding {variant} {dtype}", lambda v=variant: decoding(device, dtype, v))  # type: ignore[misc]
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description="Check and measure the Triton kernels on a CUDA device.")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="correctness and a few timings only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU kernels cannot be checked here", file=sys.stderr)
        return 2
    report = run(torch.device("cuda"), options.quick)
    if options.out:
        options.out.write_text(json.dumps({"ok": report.ok, "sections": report.sections}, indent=1))
    print("\nall checks passed" if report.ok else "\nFAILED")
    return 0 if report.ok else 1


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
