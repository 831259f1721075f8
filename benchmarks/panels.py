"""The dashboard as plain data: its panels, and their queries with the variables filled in as Grafana would.

Not how a panel is drawn (`benchmarks.dashboard`), nor who answers (`benchmarks.prometheus`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards" / "spq.json"
VARIABLE = re.compile(r"\$(\w+)")
LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel; `instant`: it is asked for one moment."""

    expr: str
    legend: str
    instant: bool

    def name(self, labels: Mapping[str, str]) -> str:
        """The legend of a series."""
        return LABEL.sub(lambda match: labels.get(match[1], ""), self.legend)


@dataclass(frozen=True, slots=True)
class Panel:
    """What is drawn in one place. `kind` and `unit` are Grafana's."""

    title: str
    row: str
    kind: str
    unit: str
    stacked: bool
    place: tuple[int, int, int, int]  # x, y, width, height, of a page 24 wide
    queries: tuple[Query, ...]


def load() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    document: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return document


def panels(document: Mapping[str, Any], values: Mapping[str, str]) -> list[Panel]:
    """All panels in order, their variables filled from `values`. Raises KeyError for one that is not there."""
    found, row = [], ""
    for panel in document["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        defaults = panel["fieldConfig"]["defaults"]
        stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        found.append(
            Panel(
                title=panel["title"],
                row=row,
                kind=panel["type"],
                unit=defaults.get("unit", "none"),
                stacked=stacked,
                place=(x, y, width, height),
                queries=tuple(_queries(panel["targets"], values)),
            )
        )
    return found


def variables(document: Mapping[str, Any]) -> dict[str, str]:
    """Query of each variable that has one, by its name."""
    return {v["name"]: v["query"]["query"] for v in document["templating"]["list"] if v["type"] == "query"}


def fill(expr: str, values: Mapping[str, str]) -> str:
    """With the variables replaced. Raises KeyError for one that is not in `values`."""
    return VARIABLE.sub(lambda match: values[match[1]], expr)


def everything(rate_interval: str) -> dict[str, str]:
    """Values that select all servers that the dashboard knows."""
    return {"job": "spq|gptq", "instance": ".+", "model": ".+", "__rate_interval": rate_interval}


def _queries(targets: Sequence[Mapping[str, Any]], values: Mapping[str, str]) -> Iterator[Query]:
    for target in targets:
        yield Query(fill(target["expr"], values), target["legendFormat"], target["instant"])
