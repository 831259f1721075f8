"""What the figures of a comparison depend on: machine, versions, commands, load. Nothing measured."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.contender import Contender
from loadtest.device import query

LOAD = ("levels", "prompt_tokens", "new_tokens", "threads", "max_others", "attempts", "any_chunks")


def facts_of(options: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    """By name, ready for JSON. Raises FileNotFoundError where a program to be started is not there."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{_cpuinfo('model name') or platform.machine()}, {os.cpu_count()} cores, {_simd()}",
        "gpu": _gpu(),
        "python": platform.python_version(),
        "commit": _output(("git", "describe", "--always", "--dirty")) if shutil.which("git") else "not known (no git)",
        "model": options.model.name,
        "load": {name: getattr(options, name) for name in LOAD},
        "servers": {contender.server.name: _server(contender) for contender in contenders},
    }
    return facts | ({"note": options.note} if options.note else {})


def _server(contender: Contender) -> str:
    """Version and command, without the paths of this machine."""
    template = contender.template
    if template.url is not None:
        return f"{template.url}, model {template.extra['model']}"
    command = [*(f"{name}={value}" for name, value in template.env.items()), *template.command]
    return f"{_output(contender.server.version)}: {' '.join(command)}"


def cpu_flags() -> list[str]:
    """What the CPU can do, in the words of /proc/cpuinfo."""
    return _cpuinfo("flags").split()


def _cpuinfo(field: str) -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _simd() -> str:
    return " ".join(
        flag for flag in cpu_flags() if flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    )


def _gpu() -> str:
    name = query("name")
    return "none" if name is None else f"{name}, {query('memory.total')} MiB, driver {query('driver_version')}"


def _output(command: tuple[str, ...]) -> str:
    """What a command prints, on either stream, in one line; some programs put their version on the second."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        return f"not known ({command[0]} ended with {error.returncode})"
    return " ".join((done.stdout.strip() or done.stderr).split())
