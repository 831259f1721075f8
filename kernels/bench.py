"""python -m kernels.bench: each operation against the memory bandwidth of this machine, for each back end.

A program, not a test. It first measures what a copy reaches here, then times operations and states the bytes each must
move at least (stored weights, inputs, outputs, the keys and values of the context), per second and as a share of the
copy's rate. Weights rotate over more memory than the last cache holds. On CUDA a pass over all copies is captured in a
graph, so that launches from Python are not what is timed. Prompt attention is bound by arithmetic: its share of the
bandwidth is small by nature.

Prints a table, then one JSON object as the last line of stdout.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.bench_cases import CPU, CUDA, QUICK, Case, Size, attention_cases, input_cases, weight_cases
from kernels.bench_machine import copy_gb_s, describe
from kernels.ops import BackendName, make_ops


@dataclass(frozen=True, slots=True)
class Result:
    """Times in microseconds; GB/s of the bytes that must move; share of the machine's copy in percent."""

    op: str
    shape: dict[str, int | str]
    backend: str
    median_us: float
    q20_us: float
    q80_us: float
    nbytes: int
    gb_s: float
    percent_of_copy: float


def measure(case: Case, backend: str, copy_rate: float, device: torch.device, budget_s: float) -> Result:
    """Median and quantiles of one call."""
    times = sorted(_cuda_times(case, budget_s) if device.type == "cuda" else _cpu_times(case, budget_s))
    low, median, high = (times[int(q * (len(times) - 1) + 0.5)] * 1e6 for q in (0.2, 0.5, 0.8))
    rate = case.nbytes / median / 1e3
    return Result(case.op, case.shape, backend, median, low, high, case.nbytes, rate, 100 * rate / copy_rate)


def _cpu_times(case: Case, budget_s: float) -> list[float]:
    case.call(case.items[0])
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < budget_s:
        item = case.items[len(times) % len(case.items)]
        before = time.perf_counter()
        case.call(item)
        times.append(time.perf_counter() - before)
    return times


def _cuda_times(case: Case, budget_s: float) -> list[float]:
    """Seconds per call, from replays of a graph that runs every item once."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):  # compiles, before capture
        case.call(case.items[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in case.items:
            case.call(item)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < budget_s:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(case.items))
    return times[1:]


def run(device: torch.device, size: Size) -> dict[str, Any]:
    """Measure everything; prints a line per result. Returns what becomes the JSON object."""
    copy_rate = copy_gb_s(device, 1 << 20 if size is QUICK else 256 << 20 if device.type == "cuda" else 64 << 20)
    print(f"copy: {copy_rate:.1f} GB/s (read and write counted)")
    print(f"{'operation':18} {'back end':10} {'median us':>10} {'20%':>9} {'80%':>9} {'GB/s':>7} {'of copy':>8}  shape")
    backends: tuple[BackendName, ...] = ("reference", "triton" if device.type == "cuda" else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: list[Result] = []
    methods: dict[str, str] = {}
    with torch.inference_mode():
        for name in backends:
            ops = make_ops(device, dtype, name)
            methods[name] = getattr(ops, "linear_method", "")
            for cases in (weight_cases, input_cases, attention_cases):
                for case in cases(ops, size):
                    result = measure(case, name, copy_rate, device, size.budget_s)
                    results.append(result)
                    print(_line(result), flush=True)
    return describe(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_s": copy_rate,
        "int8_methods": methods,
        "results": [asdict(result) for result in results],
    }


def _line(r: Result) -> str:
    shape = " ".join(f"{key}={value}" for key, value in r.shape.items())
    numbers = f"{r.median_us:10.1f} {r.q20_us:9.1f} {r.q80_us:9.1f} {r.gb_s:7.2f} {r.percent_of_copy:7.1f}%"
    return f"{r.op:18} {r.backend:10} {numbers}  {shape}"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU (default: torch's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON object to FILE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: checks the program, measures nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads}: must be at least 1")
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    report = run(device, QUICK if options.quick else CUDA if device.type == "cuda" else CPU)
    text = json.dumps(report | {"quick": options.quick})
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
