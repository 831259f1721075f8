"""Prometheus's configuration, alerts and linter, and a real one that scrapes a real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.prometheus import CONFIG, make_config
from tests.deploy.conftest import Watched

FOLDER = CONFIG.parent
# vLLM's names, kept because its dashboards and routers read them; `spq:` follows them. The linter wants colons only in
# names of recording rules.
PREFIXES = ("vllm:", "spq:")
LINTER_EXCEPTIONS = {'vllm_iteration_tokens_total non-counter metrics should not have "_total" suffix'}


def check(promtool: Path, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(promtool), *arguments], cwd=FOLDER, input=text, capture_output=True, text=True, timeout=60
    )


def test_the_configuration_and_the_alerts_are_valid(promtool: Path) -> None:
    for arguments in (["config", "prometheus.yml"], ["rules", "--lint=all", "--lint-fatal", "alerts.yml"]):
        done = check(promtool, "check", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_else(promtool: Path) -> None:
    done = check(promtool, "test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"]
    names = [rule["alert"] for group in groups for rule in group["rules"]]
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text("utf-8"))["tests"]
    cases = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    assert len(names) == len(set(names)) > 8
    assert {(name, fires) for name in names for fires in (True, False)} == set(cases)


def test_our_page_passes_the_linter_but_for_vllms_own_names(promtool: Path, watched: Watched) -> None:
    done = check(promtool, "check", "metrics", text=watched.page)
    complaints = set((done.stdout + done.stderr).splitlines())
    colons = {line for line in complaints if line.endswith(" metric names should not contain ':'")}
    assert all(line.startswith(PREFIXES) for line in colons)
    plain = re.sub(rf"\b({'|'.join(PREFIXES)})", lambda match: match[0].replace(":", "_"), watched.page)
    done = check(promtool, "check", "metrics", text=plain)
    assert set((done.stdout + done.stderr).splitlines()) == LINTER_EXCEPTIONS


def test_a_real_prometheus_scrapes_the_server_and_loads_the_alerts(watched: Watched) -> None:
    assert {series.labels["job"] for series in watched.ask("up == 1", 2)} == {"spq", "gptq"}
    (served,) = watched.ask('vllm:request_success_total{job="spq", finished_reason="length"}')
    assert served.points[0][1] >= 4
    for kind in ("weights", "kv", "free"):
        assert watched.ask(f'spq:memory_bytes{{kind="{kind}"}}'), kind
    assert "EngineDead" in watched.prometheus.rules()


def test_only_jobs_of_the_configuration_can_be_watched() -> None:
    assert [job["job_name"] for job in make_config({"gptq": ["a:1"]})["scrape_configs"]] == ["gptq"]
    with pytest.raises(ValueError, match="has the name llama"):
        make_config({"llama": ["a:1"]})
