"""Every kernel compiles for the GPUs we name, within their shared memory and without spills, on a machine with none.

In another process: with TRITON_INTERPRET set, as the tests beside this one need it, nothing can be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.gpu.aot import SHARED_LIMIT, STACK_LIMIT, loop_spills

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = [80, 86, 89, 90]
TILE_INDEX_CONVERSIONS = 4  # the integer divisions that find the tile of a program go through floats
KERNELS = [
    "packed_linear int8", "packed_linear int4", "head_linear int8", "head_linear int4", "gate_up int8", "gate_up int4",
    "int8_rows_linear", "quantize_rows", "silu_mul", "rms_norm", "embedding", "int4_embedding",
    "transform_heads", "decode_attention", "prefill_attention",
]  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "kernels.gpu.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_everywhere(tmp_path):
    out = tmp_path / "aot.json"
    jobs = str(min(4, os.cpu_count() or 1))
    result = run("--core", "--jobs", jobs, "--arch", ",".join(map(str, ARCHITECTURES)), "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())
    for arch in ARCHITECTURES:
        for dtype in ("fp16", "bf16"):
            names = [r["name"] for r in rows if r["arch"] == arch and r["name"].endswith(dtype)]
            missing = [kernel for kernel in KERNELS if not any(name.startswith(kernel) for name in names)]
            assert not missing, f"sm_{arch} {dtype}"
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[row["arch"]]
        assert row["stack"] <= STACK_LIMIT
        assert row["loop_spills"] == 0


def test_the_weights_stream_by_asynchronous_copies(tmp_path):
    out = tmp_path / "aot.json"
    result = run(
        "--arch", "80", "--only", "head_linear int8 factors 16-bit cache m16 fp16", "--sass", "--json", str(out)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(out.read_text())
    assert row["async_copies"] > 0  # none where a mask on K or an unaligned row breaks the 16-byte loads
    assert row["tensor_core"] > 0
    # int8 becomes fp16 by bits, not by the slow conversion unit, which would take 32 here (as for bf16 on sm_80).
    assert row["conversions"] <= TILE_INDEX_CONVERSIONS


def test_the_interpreter_is_refused():
    result = run("--arch", "80", "--only", "silu_mul", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


def test_spills_count_only_inside_loops():
    sass = """
.L_x_0:
        /*0000*/                   LDG.E R1, [R2] ;
        /*0010*/                   STL [R1], R4 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   LDL R4, [R1] ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""
    assert loop_spills(sass) == 1
    assert loop_spills(sass.replace("STL", "STG")) == 0
