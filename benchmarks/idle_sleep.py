"""`python -m benchmarks.idle_sleep MODEL`: what a server gives back when it sleeps, and what waking it costs a request.

Each round: an answer, /admin/sleep, then the same request again, which wakes it. Memory is the resident set of the
server's process (VmRSS), and the private part of it (RssAnon); the server's log has what a GPU holds. The cache of
files is warm: the packed weights were read a moment before. The last line is JSON; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from loadtest.process import Running

KEY = "benchmark"
START_S = 600.0


def resident(pid: int) -> dict[str, float]:
    """MiB of a process: all of it, and its private pages."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines()]
    kib = {line[0]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "RssAnon:")}
    return {"rss_mib": kib["VmRSS:"] / 1024, "private_mib": kib["RssAnon:"] / 1024}


def post(url: str, body: dict[str, Any]) -> tuple[float, Any]:
    """Seconds until the answer, and the answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=START_S) as response:
        answer = json.load(response)
    return time.monotonic() - started, answer


def one_round(url: str, pid: int) -> dict[str, float]:
    """Awake, asleep, awake again."""
    body = {"model": "model", "prompt": "It was a cold and rainy night, and", "max_tokens": 1, "temperature": 0}
    awake_s, first = post(f"{url}/v1/completions", body)
    before = resident(pid)
    to_sleep_s, _ = post(f"{url}/admin/sleep", {})
    asleep = resident(pid)
    woken_s, second = post(f"{url}/v1/completions", body)
    after = resident(pid)
    if first["choices"][0]["text"] != second["choices"][0]["text"]:
        raise RuntimeError(f"it woke up another: {first['choices']}, then {second['choices']}")
    figures = {"answer_awake_s": awake_s, "to_sleep_s": to_sleep_s, "answer_asleep_s": woken_s}
    for name, reading in (("awake", before), ("asleep", asleep), ("awake_again", after)):
        figures |= {f"{name}_{kind}": value for kind, value in reading.items()}
    return figures


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_sleep", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder; one that is not packed is compressed first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--option", action="append", default=[], help="of the server, e.g. --option=--threads=1")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "server", "--model", arguments.model, "--port", str(port)]
        command += ["--served-model-name", "model", *arguments.option]
        environment = {**os.environ, "SPQ_CACHE_DIR": cache, "SPQ_ADMIN_KEY": KEY}
        server = Running(command, environment, Path(cache) / "server.log")
        try:
            server.wait_ready(f"{url}/ready", START_S)
            rounds = [one_round(url, server.session) for _ in range(arguments.rounds)]
        finally:
            server.stop()
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    for name, value in medians.items():
        print(f"{name:26} {value:9.3f}   {min(r[name] for r in rounds):9.3f} to {max(r[name] for r in rounds):.3f}")
    where = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "idle_sleep", "model": arguments.model, **where, "rounds": rounds, **medians}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
