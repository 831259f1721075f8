"""`python -m benchmarks.coded`: coded layers in memory, what the planner predicted against what a step really takes.

A packed int8 model of random integers is made, then one process per row loads it, lets the planner choose by a
tolerance, and decodes. With --cap the process may have only so many bytes beyond what it held before the model was read
(RLIMIT_DATA: private writable memory, touched or not), fewer than the packed weights: the row of decoded layers then
ends for want of memory. On a GPU the cap is on what torch allocates there, the planner's room is what a small cache and
a step's workspace leave of it, and all steps are launched kernel by kernel. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.step import BLOCK_SIZE, make_sequences, step
from kernels.bench_machine import describe
from kernels.ops import make_ops
from kernels.stores import MovableOps
from server.config import ServerConfig
from server.engine.build import pick_dtype
from server.engine.kv_cache import allocate
from server.engine.residency import settle
from server.engine.runner import ModelRunner
from server.model.arena import CudaBus
from server.model.coded import CodedLayers
from server.model.load import load_model
from spq.allocator import mapped_blocks
from spq.architecture import read_spec
from spq.checkpoint import open_model
from spq.config import SPQConfig
from spq.layout import EMBEDDING, model_linears, model_vectors
from spq.manifest import Manifest, ModulePlan
from spq.memory import PeakMemory
from spq.sizes import format_bytes, parse_bytes
from spq.writer import TensorWriter

HEAD_DIM = 64
VOCAB = 4096
WEIGHT_STD = 0.02
WARM_STEPS = 3
WORKSPACE_BYTES = 64 << 20  # of a step of a few tokens, with room for what the allocator rounds


def make_packed(shape: str, std: float, folder: Path) -> int:
    """Write a packed int8 LLaMA, WIDTHxLAYERS, with integers of this standard deviation; returns its weight bytes."""
    width, layers = (int(part) for part in shape.split("x"))
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=-(-width * 8 // 3 // 128) * 128,
        num_hidden_layers=layers, num_attention_heads=width // HEAD_DIM, num_key_value_heads=width // HEAD_DIM,
        max_position_embeddings=2048, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    spec = read_spec(folder)
    writer = TensorWriter(folder, 1 << 32)
    generator = torch.Generator().manual_seed(0)
    plans = {}
    for module, size in model_linears(spec).items():
        q = torch.randn(size, generator=generator).mul_(std).round_().clamp_(-127, 127).to(torch.int8)
        writer.add(f"{module}.qweight", q)
        writer.add(f"{module}.scale", torch.full((size[0],), WEIGHT_STD / std))
        plans[module] = ModulePlan(kind="int8", shape=size)
    assert EMBEDDING in plans
    for name, length in model_vectors(spec).items():
        writer.add(name, torch.ones(length))
    writer.finish()
    manifest = Manifest(options=SPQConfig.preset("int8"), modules=plans, mlp_widths=(spec.intermediate_size,) * layers)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": manifest.dump()}))
    return writer.tensor_bytes


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process. Raises MemoryError or RuntimeError where the cap is too low."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    torch.set_num_threads(arguments.threads)
    ops = make_ops(
        device, pick_dtype(ServerConfig.model_validate({"model": "packed"}), device), "triton" if cuda else "native"
    )
    assert isinstance(ops, MovableOps)
    with torch.no_grad():
        torch.ones(256, 256) @ torch.ones(256, 256)  # the libraries' own memory
    memory = PeakMemory(device)
    held = _private_bytes()
    if arguments.cap and cuda:
        torch.cuda.set_per_process_memory_fraction(arguments.cap / torch.cuda.mem_get_info(device)[1], device)
    elif arguments.cap:
        resource.setrlimit(resource.RLIMIT_DATA, (held + arguments.cap,) * 2)
    source = open_model(arguments.folder)
    layers = (
        None if arguments.tolerance is None else CodedLayers(ops, arguments.threads, CudaBus(device) if cuda else None)
    )
    plan = None
    pages = -(-(arguments.prompt + arguments.tokens + WARM_STEPS + 2) // BLOCK_SIZE)
    reserve = WORKSPACE_BYTES + pages * BLOCK_SIZE * source.spec.kv_token_bytes(1)
    with mapped_blocks():
        model, used = load_model(source, ops, 512, coded=layers)
        ops.use_threads(arguments.threads)
        if layers is not None:
            room = arguments.cap - torch.cuda.memory_allocated(device) - reserve if arguments.cap and cuda else None
            plan = settle(model, layers, torch.int8, arguments.tolerance, room)
            used.leave_coded(layers)
    runner = ModelRunner(model, allocate(source.spec, pages * BLOCK_SIZE, torch.int8, device), BLOCK_SIZE)
    sequences = make_sequences(1, arguments.prompt, arguments.tokens + WARM_STEPS, VOCAB)
    step(runner, sequences, arguments.prompt)
    seconds = [step(runner, sequences, 1)[0] for _ in range(arguments.tokens + WARM_STEPS)][WARM_STEPS:]
    return {
        "coded_layers": 0 if plan is None else len(plan.coded),
        "predicted": None if plan is None else 1 / plan.token_s,
        "predicted_decoded": None if plan is None else 1 / plan.decoded_token_s,
        "measured": 1 / statistics.median(seconds),
        "weight_bytes": used.weights + used.low_rank,
        "coded_bytes": used.coded,
        "arena_bytes": used.arena,
        "host_coded_bytes": used.host_coded,
        "resident_bytes": memory.rss_bytes() - memory.rss_at_start_bytes,  # at its largest
        "gpu_bytes": memory.gpu_bytes(),  # at its largest, of tensors
    }


def run_row(arguments: argparse.Namespace, folder: Path, tolerance: str) -> dict[str, Any]:
    """`measure` in a process of its own; where it fails, why."""
    command = [sys.executable, "-m", "benchmarks.coded", "--folder", str(folder), "--threads", str(arguments.threads),
               "--tokens", str(arguments.tokens), "--prompt", str(arguments.prompt), "--cap", str(arguments.cap),
               "--device", arguments.device,
               "--tolerances", tolerance]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        sys.stderr.write(done.stderr)  # what the planner says
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}


def main() -> None:
    """Measure, print a table, then JSON."""
    arguments = _parser().parse_args()
    if arguments.folder is not None:  # one row
        logging.basicConfig(level="INFO", format="%(message)s")
        arguments.tolerance = None if arguments.tolerances == "decoded" else float(arguments.tolerances)
        print(json.dumps(measure(arguments)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = make_packed(arguments.shape, arguments.std, Path(folder) / "model")
        cap = f", {format_bytes(arguments.cap)} of memory" if arguments.cap else ""
        print(f"{arguments.shape}, integers of std {arguments.std:g}: {format_bytes(weights)} packed{cap}", flush=True)
        for tolerance in arguments.tolerances.split(","):
            rows[tolerance] = row = run_row(arguments, Path(folder) / "model", tolerance)
            print(f"{tolerance:>8}  {_line(row)}", flush=True)
    options = {name: str(value) for name, value in vars(arguments).items()}
    print(
        json.dumps(
            describe(torch.device(arguments.device)) | {"options": options, "packed_bytes": weights, "rows": rows}
        )
    )


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    kept = sum(row[key] for key in ("weight_bytes", "coded_bytes", "arena_bytes"))
    told = "" if row["predicted"] is None else (
        f"  predicted {row['predicted']:.2f} ({100 * (row['predicted'] / row['measured'] - 1):+.0f} %), decoded "
        f"{row['predicted_decoded']:.2f}")  # fmt: skip
    grown = row["gpu_bytes"] or row["resident_bytes"]
    return (f"{row['coded_layers']:3} layers coded  model {format_bytes(kept)}, grown by {format_bytes(grown)}  "
            f"{row['measured']:.2f} tokens/s{told}")  # fmt: skip


def _private_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coded", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1024x24", help="WIDTHxLAYERS of the model (default: 1024x24)")
    parser.add_argument("--std", type=float, default=6, help="standard deviation of its integers (default: 6)")
    parser.add_argument(
        "--tolerances", default="decoded,1,0.5,0.1", help="rows: decoded, or the share of tokens/s that may be lost"
    )
    parser.add_argument("--cap", type=parse_bytes, default=0, help="memory of a process beyond its own, e.g. 240MiB")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where layers run (default: cpu)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: cores)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default: 16)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens timed (default: 20)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
