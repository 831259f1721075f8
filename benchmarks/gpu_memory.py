"""`python -m benchmarks.gpu_memory FOLDER`: what loading a model takes on the device, by the driver's account.

In a process that does nothing else: a context is made, the driver asked, the model loaded as the server loads it, and
the driver asked again. The difference is what the weights take with the allocator's rounding; the context itself, of
hundreds of MB and the same for every CUDA program, is in neither. On a CPU it is the resident set. Also the readings a
program takes from outside, without a context of its own. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from kernels.ops import make_ops
from loadtest.device import gpu_bytes
from loadtest.process import members, pss_bytes
from server.config import ServerConfig
from server.engine.build import pick_dtype
from server.engine.memory import read_memory
from server.model.load import load_model
from spq.checkpoint import open_model


def device_bytes(session: int | None) -> int | None:
    """Bytes in use on the first GPU, whoever uses them, as nvidia-smi prints them; without a GPU the resident memory of
    the `session` of processes. None where neither is known."""
    used = gpu_bytes()
    return pss_bytes(members(session)) if used is None and session is not None else used


def loaded_bytes(folder: Path, device: torch.device, dtype: str) -> dict[str, int]:
    """Bytes on the device before and after loading, and what the loader counted."""
    chosen = pick_dtype(ServerConfig.model_validate({"model": str(folder), "dtype": dtype}), device)
    torch.zeros(1, device=device)  # makes the context
    ops = make_ops(device, chosen, "auto")
    before = read_memory(device).process
    source = open_model(folder)
    model, used = load_model(source, ops, source.spec.max_positions)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    after = read_memory(device).process
    del model
    return {"bytes_before": before, "bytes_loaded": after - before, "counted": used.weights + used.low_rank}


def main() -> None:
    """Print the readings as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_memory", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    print(json.dumps(loaded_bytes(options.folder, torch.device(options.device), options.dtype)))


if __name__ == "__main__":
    main()
