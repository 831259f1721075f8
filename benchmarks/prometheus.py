"""A Prometheus with this project's own configuration, but a scrape each second, beside given servers.

Not what is watched (deploy/prometheus says that) nor what is drawn (`benchmarks.panels` and `benchmarks.dashboard`).
The binary is Debian's package `prometheus`, on the path or unpacked by `make test`; no package index of Python has one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
UNPACKED = ROOT / ".venv" / "prometheus" / "usr" / "bin"  # by the Makefile
SCRAPE_S = 1
START_S = 180.0  # a busy machine
STOP_S = 20.0


class NoPrometheus(RuntimeError):
    """It is not installed, or did not start."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of an answer: its labels, its readings as (Unix seconds, value)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def find_binary(name: str) -> Path:
    """`prometheus` or `promtool`. Raises NoPrometheus."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        raise NoPrometheus(f"no {name} on the path: apt-get install prometheus")
    return Path(found)


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        """`url` is where it listens."""
        self.url = url

    def query(self, expr: str) -> list[Series]:
        """What a query gives now. Raises ValueError with what Prometheus says of a wrong one."""
        answer = self._get("query", query=expr)
        return [Series(row["metric"], [_point(row["value"])]) for row in answer["result"]]

    def query_range(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """A query over a time, Unix seconds. Raises ValueError as `query` does."""
        answer = self._get("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [Series(row["metric"], [_point(point) for point in row["values"]]) for row in answer["result"]]

    def rules(self) -> list[str]:
        """Names of the alert rules it evaluates."""
        return [rule["name"] for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: str | float) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {error.read().decode(errors='replace')}") from None


@contextlib.contextmanager
def watch(targets: Mapping[str, Sequence[str]], folder: Path) -> Iterator[Prometheus]:
    """Prometheus on a free port over `host:port` targets by job; its data goes to `folder`. Raises NoPrometheus."""
    binary = find_binary("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(make_config(targets)), "utf-8")  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(binary), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait_ready(f"http://127.0.0.1:{port}", process, log)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # its data is thrown away anyway
            process.kill()
            process.wait()


def make_config(targets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The deployed configuration, with other targets and intervals; jobs without targets are left out."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text("utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    unknown = set(targets) - {job["job_name"] for job in jobs}
    if unknown:
        raise ValueError(f"no job in {CONFIG.name} has the name {', '.join(sorted(unknown))}")
    for job in jobs:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    config["scrape_configs"] = jobs
    return config


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.05)
    raise NoPrometheus(f"Prometheus did not start: {log.read_text(errors='replace')[-2000:]}")


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
