"""Memory of the first GPU, as its driver counts it for everyone; None where there is none."""

from __future__ import annotations

import subprocess

MIB = 1 << 20


def query(field: str) -> str | None:
    """A field of nvidia-smi about the first GPU, such as `name` or `memory.used` (MiB); None where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_bytes() -> int | None:
    """Bytes in use on the first GPU, whoever uses them."""
    printed = query("memory.used")
    return int(printed) * MIB if printed is not None and printed.isdecimal() else None
