"""A Ray cluster of several nodes on this machine with the server on it, on addresses of the loopback network alone."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from server.ray_app import NAME

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # of Ray's workers: they import the clone
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray_edge:middleware",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else the proxy's own node gets all, until its replica is full
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
MODEL = ROOT / "demo" / "storyteller"
CONFIGURATION = ROOT / "deploy" / "ray" / "serve.yaml"


@dataclass(slots=True)
class Running:
    """A cluster whose proxy answers at `url`."""

    cluster: Cluster
    url: str
    logs: Path
    num_nodes: int = 0
    nodes: list[Any] = field(default_factory=list)

    def add_node(self) -> Any:
        """A further one. 127.0.0.1 itself does not do: Ray takes the machine's own address in its place."""
        self.num_nodes += 1
        node = self.cluster.add_node(node_ip_address=f"127.0.0.{self.num_nodes + 1}", **NODE)
        self.nodes.append(node)
        return node

    def replicas(self) -> list[Any]:
        """Those that run: each with `pid` and `node_ip`."""
        details = _get_global_client().get_serve_details()
        deployments = details["applications"].get(NAME, {}).get("deployments", {})
        found = deployments[NAME]["replicas"] if NAME in deployments else []
        return [replica for replica in found if replica["state"] == "RUNNING"]

    def wait_for_replicas(self, count: int, timeout_s: float = 300.0) -> list[Any]:
        """Until so many run on nodes that live."""
        wait_until(lambda: len(self.replicas()) == count, timeout_s)
        return self.replicas()

    def post(self, path: str, timeout_s: float = 120.0, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": "demo", **body}, timeout=timeout_s)

    def metrics(self) -> str:
        """What a Prometheus gets from the nodes."""
        places = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
        return "".join(httpx.get(f"http://{place}/metrics", timeout=20).text for place in places)

    def log_lines(self, pattern: str) -> list[str]:
        """What Ray's files of some processes hold."""
        return [line for file in self.logs.rglob(pattern) for line in file.read_text("utf-8", "replace").splitlines()]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@contextmanager
def serving(num_nodes: int, **options: Any) -> Iterator[Running]:
    """As many nodes, each with a replica of the demo model, and one proxy on the first."""
    folder = tempfile.mkdtemp(prefix="spq-", dir="/tmp")  # short: sockets lie in it
    environment = {**ENVIRONMENT, "RAY_TMPDIR": folder}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = Cluster()
    running = Running(cluster, f"http://127.0.0.1:{port}", Path(folder))
    try:
        for _ in range(num_nodes):
            running.add_node()
        ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        _get_global_client().deploy_apps(_configuration(folder, port, num_nodes, options))
        running.wait_for_replicas(num_nodes)
        yield running
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _configuration(folder: str, port: int, num_replicas: int, options: dict[str, Any]) -> ServeDeploySchema:
    """deploy/ray/serve.yaml with what this machine needs: the demo model on CPUs, as many replicas as nodes."""
    config: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (application,) = config["applications"]
    application["args"] |= {"model": str(MODEL), "served_model_name": "demo", "preset": "none", "device": "cpu",
                            "backend": "reference", "cache_dir": folder, "kv_memory": "128MiB", "max_num_seqs": 16,
                            "drain_timeout": 5, **options}  # fmt: skip
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": num_replicas, "max_replicas_per_node": 1,
                   "ray_actor_options": {"num_cpus": 1, "num_gpus": 0}}  # fmt: skip
    return ServeDeploySchema.model_validate(config)
