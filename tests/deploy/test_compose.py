"""docker-compose.yml: the schema of the specification, who may be up together, and .env.example beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cli import OPTIONS
from tests.deploy.recipe import ROOT, stage

FILE = ROOT / "docker-compose.yml"
TEXT = FILE.read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(re.findall(r"^([A-Z_0-9]+)=(.*)$", (ROOT / ".env.example").read_text("utf-8"), re.M))
USED = dict(re.findall(r"\$\{([A-Z_0-9]+):-([^}]*)\}", TEXT))
SERVERS = ("spq-cpu", "spq-gpu", "spq-replica-0", "spq-replica-1", "gptq-8bit", "gptq-4bit")


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_file_follows_the_compose_specification(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    assert check_schema(FILE).returncode == 0, check_schema(FILE).stdout
    bad = tmp_path / "docker-compose.yml"
    bad.write_text(TEXT.replace("read_only: true", "readonly: true"))
    assert "readonly" in check_schema(bad).stdout


def of_profile(name: str) -> list[str]:
    return [service for service, body in SERVICES.items() if name in body["profiles"]]


def test_every_profile_is_there() -> None:
    profiles = {profile for body in SERVICES.values() for profile in body["profiles"]}
    assert profiles == {"cpu", "gpu", "replicas", "compare", "observability", "gptq-8bit", "gptq-4bit"}
    assert of_profile("cpu") == ["spq-cpu", "prometheus", "grafana"]
    assert of_profile("observability") == ["prometheus", "grafana"]
    assert of_profile("compare") == ["loadtest"]  # the servers are started by deploy/compare.sh, one at a time


def cards(service: str) -> list[str]:
    devices = SERVICES[service].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    return [card for device in devices for card in device["device_ids"]]


@pytest.mark.parametrize("profile", sorted({p for body in SERVICES.values() for p in body["profiles"]}))
def test_no_profile_puts_two_servers_on_a_card(profile: str) -> None:
    taken = [card for service in of_profile(profile) if service in SERVERS for card in cards(service)]
    assert len(taken) == len(set(taken))


def test_servers_on_gpus_name_their_card() -> None:
    assert [service for service in SERVERS if not cards(service)] == ["spq-cpu"]
    assert cards("spq-gpu") == cards("gptq-8bit") == cards("gptq-4bit") == cards("loadtest")


def test_prometheus_finds_servers_by_name() -> None:
    # deploy/prometheus/prometheus.yml looks these names up
    aliases = {service: SERVICES[service]["networks"]["default"]["aliases"] for service in SERVERS}
    assert {service: ["gptq" if service.startswith("gptq") else "spq"] for service in SERVERS} == aliases


@pytest.mark.parametrize("service", [name for name in SERVERS if name.startswith("spq")])
def test_our_containers_write_to_volumes_alone(service: str) -> None:
    body = SERVICES[service]
    assert body["read_only"] is True
    assert body["tmpfs"] == ["/tmp"]
    assert body["cap_drop"] == ["ALL"]
    assert [volume for volume in body["volumes"] if not volume.endswith(":ro")] == ["cache:/cache"]
    assert int(body["stop_grace_period"].rstrip("s")) > 30 + 5, "shorter than the drain"


def test_nothing_is_published_to_everyone_by_default() -> None:
    for service, body in SERVICES.items():
        assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in body.get("ports", [])), service


def test_options_of_servers_are_options() -> None:
    known = {option.variable for group in OPTIONS.values() for option in group}
    for service in SERVERS:
        given = {name for name in SERVICES[service].get("environment", {}) if name.startswith("SPQ_")}
        assert given <= known, service


def test_the_example_names_every_value_once_with_its_default() -> None:
    script = (ROOT / "deploy" / "compare.sh").read_text("utf-8")
    of_script = set(re.findall(r"value ([A-Z_]+)", script))
    assert set(EXAMPLE) == set(USED) | of_script
    assert {name: EXAMPLE[name] for name in USED} == USED
    assert len(re.findall(r"^[A-Z_0-9]+=", (ROOT / ".env.example").read_text("utf-8"), re.M)) == len(EXAMPLE)


def test_what_is_mounted_from_the_repository_is_there() -> None:
    sources = [v.partition(":")[0] for body in SERVICES.values() for v in body.get("volumes", []) if v.startswith("./")]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_images_are_pinned_and_built_ones_have_their_target() -> None:
    for service, body in SERVICES.items():
        image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", body["image"])
        if "build" in body:
            if "target" in body["build"]:
                assert stage(body["build"]["target"]).name == body["build"]["target"]
        else:
            assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", image), f"{service}: {image}"
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    assert EXAMPLE["PYTHON_IMAGE"] == base
