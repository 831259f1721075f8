"""The dashboard: well formed, and each of its queries has an answer from a Prometheus that watches both servers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from benchmarks.panels import FILE, Panel, everything, fill, load, panels, variables
from benchmarks.prometheus import CONFIG, Prometheus
from tests.deploy.conftest import WAIT_S, Watched

DASHBOARD = load()
VALUES = everything("1m")  # two scrapes of it must have succeeded
PANELS = panels(DASHBOARD, VALUES)
PROVISIONING = FILE.parents[1] / "provisioning"
KINDS = {"timeseries", "stat", "table", "row"}
UNITS = {"none", "s", "bytes", "percentunit", "reqps"}
NEEDS_A_GPU = {"Card: memory in use and in all"}  # dcgm-exporter
# What vLLM does not tell, or only where the feature is on; its page here is of one without.
ONLY_OURS = {"Phase", "Last start", "spq: device memory by kind", "Compression", "Rank kept",
             "What compression did", "spq: duration of a step", "spq: mean step by phase",
             "Guessed tokens that were right"}  # fmt: skip


def answers(prometheus: Prometheus, panel: Panel, job: str) -> list[bool]:
    """For each query of the panel: does it have series of this job."""
    return [any(s.labels.get("job", job) == job for s in prometheus.query(query.expr)) for query in panel.queries]


def test_every_query_has_an_answer_for_every_server_that_tells(watched: Watched) -> None:
    assert {panel.title for panel in PANELS} > NEEDS_A_GPU | ONLY_OURS
    missing = [
        (job, panel)
        for job, without in (("spq", NEEDS_A_GPU), ("gptq", NEEDS_A_GPU | ONLY_OURS))
        for panel in PANELS
        if panel.title not in without
    ]
    end = time.monotonic() + WAIT_S
    while missing := [(job, panel) for job, panel in missing if not all(answers(watched.prometheus, panel, job))]:
        assert time.monotonic() < end, [(job, panel.title) for job, panel in missing]
        time.sleep(0.5)


def test_what_is_said_to_be_ours_alone_has_no_answer_from_vllm(watched: Watched) -> None:
    for panel in PANELS:
        if panel.title in NEEDS_A_GPU | ONLY_OURS:
            assert not any(answers(watched.prometheus, panel, "gptq")), panel.title


def test_what_needs_a_gpu_is_understood_at_least(watched: Watched) -> None:
    for panel in PANELS:
        if panel.title in NEEDS_A_GPU:
            assert [watched.prometheus.query(query.expr) for query in panel.queries] == [[], []]


def test_the_figures_are_those_of_the_server(watched: Watched) -> None:
    by_title = {panel.title: panel for panel in PANELS}
    (ledger, whole) = (watched.ask(query.expr) for query in by_title["spq: device memory by kind"].queries)
    assert whole[0].points[0][1] > 0
    assert sum(series.points[0][1] for series in ledger) == pytest.approx(whole[0].points[0][1])
    names = [query.name(s.labels) for query in by_title["Ready"].queries for s in watched.ask(query.expr, 2)]
    assert {name.split()[0] for name in names} == {"spq", "gptq"}


def test_variables_and_alerts_are_understood(watched: Watched) -> None:
    found = variables(DASHBOARD)
    assert set(found) == {"job", "instance", "model"}
    for name, query in found.items():
        expr, label = fill(query, VALUES).removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        assert {s.labels[label] for s in watched.ask(expr)}, name
    for annotation in DASHBOARD["annotations"]["list"]:
        watched.prometheus.query(fill(annotation["expr"], VALUES))
    with pytest.raises(ValueError, match="parse error"):
        watched.prometheus.query("sum(")


def test_panels_are_well_formed() -> None:
    places: list[Mapping[str, int]] = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 20
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in KINDS, panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            assert [t["refId"] for t in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])]), panel["title"]
            assert panel["fieldConfig"]["defaults"].get("unit", "none") in UNITS, panel["title"]
    for a, b in itertools.combinations(places, 2):
        assert not overlap(a, b), (a, b)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    source = provisioned("datasources/prometheus.yml")["datasources"][0]
    variable = next(v for v in DASHBOARD["templating"]["list"] if v["name"] == "datasource")
    assert variable["current"]["value"] == source["uid"]
    interval = yaml.safe_load(CONFIG.read_text("utf-8"))["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    assert provisioned("dashboards/spq.yml")["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


def provisioned(name: str) -> Any:
    return yaml.safe_load((PROVISIONING / name).read_text("utf-8"))


def overlap(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in (("x", "w"), ("y", "h")))
