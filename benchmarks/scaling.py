"""`python -m benchmarks.scaling`: tokens/s of one and of two replicas on Ray Serve, beside the server by itself.

One CPU thread a replica, so that two replicas are twice the compute on two cores; the client, Ray's proxy and its
other processes share those cores, as they would not on a cluster. In turn, round by round: the server alone, one
replica, two replicas. Needs the extra `ray`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from loadtest.client import Wave, make_prompts, run_wave
from loadtest.process import Running
from server.ray_app import NAME, make_deployment, read_options

ADDRESS = "127.0.0.2"  # of the node: Ray takes the machine's own address in the place of 127.0.0.1
EDGE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray_edge:middleware", "PYTHONPATH": os.getcwd()}
START_LIMIT_S = 600
CASES = ("alone", "1 replica", "2 replicas")


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def replicas(count: int, arguments: argparse.Namespace) -> Iterator[int]:
    """Ray with so many replicas; the port of its proxy."""
    port = free_port()
    os.environ |= EDGE
    ray.init(num_cpus=count, include_dashboard=False, _node_ip_address=ADDRESS, log_to_driver=False,
             object_store_memory=100 * 1024**2)  # fmt: skip
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        options = {"model": arguments.model, "served_model_name": "bench", "preset": arguments.preset, "threads": 1,
                   "cache_dir": str(arguments.cache_dir), "prefix_caching": False, "access_log": "off"}  # fmt: skip
        deployment = make_deployment(read_options(options)).options(num_replicas=count)
        serve.run(deployment.bind(), name=NAME)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def alone(arguments: argparse.Namespace) -> Iterator[int]:
    """The server as it is without Ray; its port."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--model", arguments.model, "--served-model-name", "bench", "--preset",
               arguments.preset, "--threads", "1", "--cache-dir", str(arguments.cache_dir), "--prefix-caching", "off",
               "--access-log", "off", "--port", str(port)]  # fmt: skip
    server = Running(command, os.environ, arguments.cache_dir / "scaling.log")
    try:
        server.wait_ready(f"http://127.0.0.1:{port}/ready", START_LIMIT_S)
        yield port
    finally:
        server.stop()


def measure(case: str, arguments: argparse.Namespace, seed: int) -> list[Wave]:
    """One wave for each number of streams, after one that warms."""
    started = alone(arguments) if case == "alone" else replicas(int(case.split()[0]), arguments)
    waves = []
    with started as port:
        for streams in (max(arguments.streams), *arguments.streams):
            prompts = make_prompts(Path(arguments.model), streams, arguments.prompt_tokens, seed)
            wave = asyncio.run(run_wave(port, prompts, arguments.new_tokens, {"ignore_eos": True}))
            wave.check_sizes(arguments.prompt_tokens)
            waves.append(wave)
            seed += 1
    return waves[1:]


def main() -> None:
    """Measure in turn, print a table, then JSON."""
    arguments = _parser().parse_args()
    arguments.cache_dir.mkdir(parents=True, exist_ok=True)
    speeds: dict[str, list[list[float]]] = {case: [] for case in CASES}
    for number in range(arguments.rounds):
        for case in CASES:
            waves = measure(case, arguments, 1000 * number)
            speeds[case].append([wave.tokens_per_s for wave in waves])
            print(f"round {number + 1}, {case}: " + ", ".join(f"{wave.tokens_per_s:.1f}" for wave in waves), flush=True)
    rows = []
    for column, streams in enumerate(arguments.streams):
        medians = {case: statistics.median(speed[column] for speed in speeds[case]) for case in CASES}
        ratios = [two[column] / one[column] for one, two in zip(speeds[CASES[1]], speeds[CASES[2]], strict=True)]
        rows.append({"streams": streams, "tokens_per_s": medians, "ratio_2_to_1": statistics.median(ratios),
                     "ratio_min": min(ratios), "ratio_max": max(ratios)})  # fmt: skip
        figures = "   ".join(f"{case} {speed:.1f}" for case, speed in medians.items())
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"
        print(f"{streams:3} streams: {figures} tokens/s   2 to 1: {spread}")
    options = {name: str(value) for name, value in vars(arguments).items()}
    print(json.dumps({"options": options, "cores": os.cpu_count(), "ray": ray.__version__, "rows": rows}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder with tokenizer.json, such as that of benchmarks.model")
    parser.add_argument("--preset", default="int8", choices=("default", "paper", "int8", "int4", "none"))
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16], help="streams at once (default: 8 16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/spq-serve").expanduser())
    return parser


if __name__ == "__main__":
    main()
