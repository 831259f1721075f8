"""Peak memory of this process, by the operating system's own account.

Not an estimate from tensor sizes: resident pages, and what PyTorch allocated on a GPU.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peaks since it was made. On Linux the kernel's high-water mark is reset; elsewhere it is the process's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets VmHWM (proc(5)); not permitted in some containers
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.rss_at_start_bytes = self.rss_now_bytes()

    def rss_now_bytes(self) -> int:
        """Resident memory at the moment, in bytes; elsewhere than on Linux the largest so far."""
        return _status_bytes("VmRSS") or _max_rss_bytes()

    def rss_bytes(self) -> int:
        """Largest resident memory, in bytes, interpreter and libraries included."""
        return _status_bytes("VmHWM") or _max_rss_bytes()

    def gpu_bytes(self) -> int:
        """Largest GPU memory held by tensors, in bytes; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0


def _status_bytes(key: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _max_rss_bytes() -> int:
    """getrusage counts KiB on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
