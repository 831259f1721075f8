"""python -m kernels.gpu.aot: compile every kernel for GPUs this machine need not have, and judge what came out.

    python -m kernels.gpu.aot [--arch 80,86,89,90] [--only NAME] [--core] [--sass] [--jobs N] [--json FILE]

Neither GPU, driver nor CUDA toolkit is needed: ptxas and the disassembler come inside the triton wheel. Exit status
1 when a kernel does not compile, needs more shared memory than a block may have, or spills registers in a loop.
Must not run under TRITON_INTERPRET (exit status 2): interpreted functions cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.gpu.aot_kernels import KernelSpec, kernel_specs

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes per block (CUDA programming guide, table 24)
STACK_LIMIT = 32  # bytes: a few spilled registers outside the loop are harmless; versions of triton differ in them
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)$")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def compile_kernel(spec: KernelSpec, arch: int, sass: bool = False) -> dict[str, Any]:
    """Resources and verdict ("ok" or what is wrong) of one kernel on one architecture (80 means sm_80).

    With `sass` instructions are counted too; without, machine code is read only where registers may have spilled.
    """
    began = time.perf_counter()
    row: dict[str, Any] = {"name": spec.name, "arch": arch}
    try:
        compiled = triton.compile(_source(spec), target=GPUTarget("cuda", arch, 32), options=dict(spec.options))
    except Exception as error:  # the compiler raises many kinds; each is this kernel's verdict
        return row | {"verdict": f"does not compile: {type(error).__name__}: {error}"[:2000]}
    row |= _resources(compiled.asm["cubin"], sass)
    row["shared"] = compiled.metadata.shared
    problems = []
    if row["shared"] > SHARED_LIMIT[arch]:
        problems.append(f"{row['shared']} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
    if row["stack"] > STACK_LIMIT:
        problems.append(f"{row['stack']} bytes of stack, {STACK_LIMIT} allowed")
    if row["loop_spills"]:
        problems.append(f"{row['loop_spills']} loads or stores of spilled registers in a loop")
    return row | {"seconds": round(time.perf_counter() - began, 2), "verdict": "; ".join(problems) or "ok"}


def _source(spec: KernelSpec) -> ASTSource:
    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constants else spec.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in spec.constants.items()}
    aligned = [name for name in names if signature[name].startswith("*") or name in spec.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes, sass: bool) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert match is not None, usage
        found = {"registers": int(match[1]), "stack": int(match[2]), "loop_spills": 0}
        if not (sass or found["stack"]):
            return found
        code = _tool("nvdisasm", "-c", file.name)
    opcodes = [m[1] for line in code.splitlines() if (m := _OPCODE.match(line))]
    return found | {
        "loop_spills": loop_spills(code),
        "instructions": len(opcodes),
        "spills": sum(op.startswith(("LDL", "STL")) for op in opcodes),
        "tensor_core": sum(op.startswith(("HMMA", "HGMMA", "IMMA", "IGMMA")) for op in opcodes),
        "async_copies": sum(op.startswith("LDGSTS") for op in opcodes),
        "conversions": sum(op.startswith("I2F") for op in opcodes),
    }


def loop_spills(sass: str) -> int:
    """Instructions that touch local memory (LDL, STL) between the target of a backward branch and the branch."""
    labels: dict[str, int] = {}
    local: list[int] = []
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(sass.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif instruction := _OPCODE.match(line):
            if instruction[1].startswith(("LDL", "STL")):
                local.append(number)
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], number))
    loops = [(begin, end) for begin, end in loops if end - begin > 1]  # the idle loop after EXIT
    return sum(any(begin < at < end for begin, end in loops) for at in local)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout


def _compile_numbered(number: int, arch: int, sass: bool) -> dict[str, Any]:
    return compile_kernel(kernel_specs(arch)[number], arch, sass)


def main(arguments: list[str] | None = None) -> int:
    """Compile all; print a table; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument("--arch", default="80,86,89,90")
    parser.add_argument("--only", default="", help="compile kernels whose name contains this")
    parser.add_argument("--core", action="store_true", help="one or two variants of each kernel, not all tiles")
    parser.add_argument("--sass", action="store_true", help="count instructions by kind (slower)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not isinstance(kernel_specs(80)[0].kernel, JITFunction):
        print("TRITON_INTERPRET is set; unset it: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    work = [
        (number, int(arch), options.sass)
        for arch in options.arch.split(",")
        for number, spec in enumerate(kernel_specs(int(arch)))
        if options.only in spec.name and (spec.core or not options.core)
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_compile_numbered, *zip(*work, strict=True))) if work else []
    for row in rows:
        numbers = " ".join(f"{row.get(key, '-'):>6}" for key in ("registers", "shared", "stack", "async_copies"))
        print(f"{row['name']:<36} sm_{row['arch']} {numbers}  {row['verdict']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if any(row["verdict"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
