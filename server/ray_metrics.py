"""The server's metrics among Ray's own, replica by replica: a Prometheus that scrapes the nodes has them all.

A scrape of `/metrics` through Ray's proxy would reach one replica, by chance. Ray's library knows no collector but
values set one by one, so every sample is a gauge there, counters and buckets too: rates and quantiles are asked for in
the same way, of `ray_vllm_generation_tokens_total` for `vllm:generation_tokens_total`. Not what is measured
(`server.metrics`).
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry
from ray.serve.metrics import Gauge

EVERY_S = 5.0  # twice in the ten seconds after which Ray's agents are told by default


class Published:
    """The samples of a registry as gauges of Ray, which adds application, deployment and replica to their labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    async def go_on(self) -> None:
        """Publish until cancelled."""
        while True:
            self.publish()
            await asyncio.sleep(EVERY_S)

    def publish(self) -> None:
        """Set every gauge to what the registry says now."""
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    gauge = self._gauge(sample.name, family.documentation, tuple(sample.labels))
                    gauge.set(sample.value, tags=dict(sample.labels))

    def _gauge(self, name: str, documentation: str, labels: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name.replace(":", "_"), description=documentation, tag_keys=labels)
        return self._gauges[name]
