"""A real server in a process of its own, and what it holds: memory, descriptors, threads, queue and cache.

Not the load (`traffic`). The demo model on one thread, so that a client has a core to itself where there are two.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from loadtest.process import Running

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
MODEL = "demo"  # what requests call it
STORYTELLER = ROOT / "demo" / "storyteller"
CACHE = Path(tempfile.gettempdir()) / "spq-soak-cache"
POOL_THREADS = (os.cpu_count() or 1) + 4  # asyncio's executor makes them when first needed, and no more


@dataclass(frozen=True, slots=True)
class Holdings:
    """One reading of a server."""

    rss_mib: float
    descriptors: int
    threads: int
    running: int
    waiting: int
    kv_share: float  # 0..1


class Target:
    """A started server."""

    def __init__(self, process: Running, port: int) -> None:
        self.process = process
        self.port = port

    @property
    def pid(self) -> int:
        """Of the server."""
        return self.process.session

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name, labels but the model's in brackets, summed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(
                    f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")
                )
                name = f"{sample.name}[{labels}]" if labels else sample.name
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def holdings(self) -> Holdings:
        """What it holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text("ascii", "replace")
        fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
        metrics = self.metrics()
        return Holdings(
            rss_mib=int(fields["VmRSS"]) * 1024 / MIB,
            descriptors=len(os.listdir(f"/proc/{self.pid}/fd")),
            threads=int(fields["Threads"]),
            running=int(metrics["vllm:num_requests_running"]),
            waiting=int(metrics["vllm:num_requests_waiting"]),
            kv_share=metrics["vllm:kv_cache_usage_perc"],
        )

    def cpu_s(self) -> float:
        """CPU seconds of the server's process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settled(self, limit_s: float = 20.0) -> Holdings:
        """Its holdings once nothing runs and no client's connection is left, or after the limit."""
        end = time.monotonic() + limit_s
        found = self.holdings()
        while time.monotonic() < end and (found.running or found.waiting or found.kv_share > 0):
            time.sleep(0.1)
            found = self.holdings()
        time.sleep(0.5)  # sockets that close in both directions
        return self.holdings()

    def alive(self) -> bool:
        """Whether the process is still there."""
        return (
            Path(f"/proc/{self.pid}/stat").exists() and "Z" not in Path(f"/proc/{self.pid}/stat").read_text().split()[2]
        )


@contextlib.contextmanager
def serving(*arguments: str, program: Sequence[str] = ("-m", "server"), model: Path = STORYTELLER) -> Iterator[Target]:
    """The server of a model, ready. Raises NotReady where it is not within five minutes."""
    port = free_port()
    command = [sys.executable, *program, "--model", str(model), "--served-model-name", MODEL]
    command += ["--port", str(port), "--threads", "1", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPQ_")} | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        environment.setdefault("SPQ_CACHE_DIR", str(CACHE))
        process = Running(command, environment, Path(scratch) / "log")
        try:
            process.wait_ready(f"http://127.0.0.1:{port}/ready", 300.0)
            yield Target(process, port)
        finally:
            process.stop()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def grown(before: Holdings, after: Holdings, rss_mib: float) -> list[str]:
    """What did not go back to where it was; memory may grow by `rss_mib`."""
    found = []
    if after.rss_mib > before.rss_mib + rss_mib:
        found.append(f"memory {before.rss_mib:.0f} to {after.rss_mib:.0f} MiB")
    for name in ("descriptors", "threads", "running", "waiting", "kv_share"):
        was, now = getattr(before, name), getattr(after, name)
        if now > was + (POOL_THREADS if name == "threads" else 0):
            found.append(f"{name} {was} to {now}")
    return found


def finish(name: str, figures: dict[str, Any], complaints: list[str]) -> int:
    """Print the verdict and, last, a line of JSON; returns the exit status."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {
        "program": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip(),
        "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    for complaint in complaints:
        print(f"FAILED: {complaint}")
    print("ok" if not complaints else f"{len(complaints)} failures")
    shown = {key: asdict(value) if isinstance(value, Holdings) else value for key, value in figures.items()}
    print(json.dumps({**facts, "ok": not complaints, **shown}))
    return 1 if complaints else 0
