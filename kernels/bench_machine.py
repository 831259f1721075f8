"""What a benchmark ran on: names, versions, commit, and the memory bandwidth a plain copy reaches.

Not the measurements themselves (`bench`).
"""

from __future__ import annotations

import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def copy_gb_s(device: torch.device, nbytes: int, repeats: int = 12) -> float:
    """GB/s (10^9) of copying `nbytes` to another place of the same memory, read and write counted: the median."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times[2:])[len(times[2:]) // 2] / 1e9


def describe(device: torch.device) -> dict[str, Any]:
    """machine, versions, commit (None outside a git checkout) and date (UTC, ISO 8601)."""
    machine: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    else:
        machine["vectors"] = torch.backends.cpu.get_cpu_capability()
    return {
        "machine": {"device": device.type, **machine},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    """The model name Linux knows, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
