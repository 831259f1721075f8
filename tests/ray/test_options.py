"""What Ray's application takes as options, and that serve's configuration is one that Ray accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed here: make test-scale")

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from server.cli import OPTIONS, WrongOption
from server.config import ServerConfig
from server.ray_app import AT_HAND, END_S, NAME, REFUSED, make_deployment, read_options

FILE = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "serve.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))


def test_options_have_the_names_of_the_flags_and_the_types_of_yaml() -> None:
    args = {"model": "m", "max_num_seqs": 8, "prefix-caching": False, "api_key": ["a", "b"], "memory_budget": "6GiB"}
    config = read_options(args, {})
    assert (config.max_num_seqs, config.prefix_caching, config.api_keys) == (8, False, ("a", "b"))
    assert config.memory_budget == 6 * 1024**3


def test_variables_count_and_an_option_wins() -> None:
    config = read_options({"max_num_seqs": 8}, {"SPQ_MODEL": "m", "SPQ_MAX_NUM_SEQS": "4", "SPQ_MAX_QUEUE": "7"})
    assert (config.model, config.max_num_seqs, config.max_queue) == ("m", 8, 7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "is missing"),
        ({"model": "m", "colour": "red"}, "--colour"),
        ({"model": "m", "max_queue": -1}, "--max-queue"),
    ],
)
def test_a_wrong_option_is_an_error_and_ends_no_process(args: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongOption, match=message):
        read_options(args, {})


VALUES = {"host": "0.0.0.0", "port": 9000, "client-timeout": 5, "admin-key": "k", "sleep-idle-seconds": 60,
          "response-store": "1MiB"}  # fmt: skip


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_what_ray_does_in_the_servers_place_is_refused(flag: str, tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    given = {flag: VALUES[flag]} if flag in VALUES else {"tls-cert": str(pem), "tls-key": str(pem)}
    name = next(iter(given))
    with pytest.raises(WrongOption, match=f"--{name} .* is not for replicas"):
        read_options({"model": "m", **given}, {})
    variables = {"SPQ_" + name.replace("-", "_").upper(): str(value) for name, value in given.items()}
    with pytest.raises(WrongOption, match=f"--{name} .* is not for replicas"):
        read_options({"model": "m"}, variables)


def test_every_refused_flag_is_one_of_the_servers() -> None:
    assert set(REFUSED) <= {option.flag for group in OPTIONS.values() for option in group}


def test_nothing_is_kept_for_a_request_that_may_reach_another_replica() -> None:
    assert ServerConfig(model="m").response_store_bytes > 0
    assert read_options({"model": "m"}, {}).response_store_bytes == 0


def test_limits_of_the_server_become_those_of_ray() -> None:
    args = {"model": "m", "max_num_seqs": 8, "max_queue": 7, "drain_timeout": 3}
    deployment = make_deployment(read_options(args, {}))
    assert deployment.name == NAME
    assert deployment.max_ongoing_requests == 8 + AT_HAND
    assert deployment.max_queued_requests == 7
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 3 + END_S


def test_the_configuration_is_one_that_ray_accepts() -> None:
    checked = ServeDeploySchema.model_validate(CONFIG)
    (application,) = checked.applications
    assert application.import_path == "server.ray_app:app"
    (deployment,) = application.deployments
    assert deployment.name == NAME
    bad = {"applications": [{**CONFIG["applications"][0], "deployments": [{"name": NAME, "num_replicas": -1}]}]}
    with pytest.raises(ValidationError, match="num_replicas"):
        ServeDeploySchema.model_validate(bad)


def test_ray_knows_every_key_of_the_configuration() -> None:
    """It takes unknown ones too, and does nothing about them."""
    assert ServeDeploySchema.model_validate(CONFIG).model_dump(exclude_unset=True) == CONFIG


def test_the_configuration_listens_on_this_machine_alone() -> None:
    assert CONFIG["http_options"]["host"] == "127.0.0.1"


def test_its_options_are_the_servers() -> None:
    (application,) = CONFIG["applications"]
    config = read_options(application["args"], {})
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] <= config.max_num_seqs
