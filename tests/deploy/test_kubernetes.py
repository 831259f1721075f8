"""deploy/kubernetes: Kubernetes' own schemas, strictly, and that the manifests say what the server and its image say.

No cluster is asked: a schema knows keys and types, not whether a volume or a card is there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from server.api import admin
from server.api.keys import OPEN_PATHS
from server.cli import OPTIONS, read_config
from server.config import ServerConfig
from server.listener import CONNECTIONS_END_S
from tests.deploy.recipe import ROOT, stage

OLDEST, NEWEST = "1.31", "1.37"  # of Kubernetes, that docs/deploy.md names and that are known here
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
OPTIONAL = {"autoscaler.yaml", "fill-models.yaml"}  # applied by hand
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


ALL = {(d["kind"], d["metadata"]["name"]): d for name in FILES for d in documents(name)}
DEPLOYMENT = ALL["Deployment", "spq-serve"]["spec"]
PODS = {"server": DEPLOYMENT["template"]["spec"], "filler": ALL["Pod", "fill-models"]["spec"]}
POD = PODS["server"]
(SERVER,) = POD["containers"]
KUSTOMIZATION: Document = documents("kustomization.yaml")[0]


def refused(document: Document, version: str = NEWEST) -> bool:
    schemas = pytest.importorskip("kubernetes_validate")
    try:
        schemas.validate(document, version, strict=True)
    except schemas.ValidationError:
        return True
    return False


def mappings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where each mapping stands."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            yield from mappings(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from mappings(inner, (*path, i))


@pytest.mark.parametrize("kind", ALL, ids="-".join)
def test_every_document_follows_the_schema_and_no_unknown_key_does(kind: tuple[str, str]) -> None:
    document = ALL[kind]
    assert not refused(document, OLDEST) and not refused(document, NEWEST)
    for path in mappings(document):
        wrong = copy.deepcopy(document)
        place: Any = wrong
        for step in path:
            place = place[step]
        place["noSuchKey"] = [0]  # a list, which maps of any name (labels, limits) do not take either
        assert refused(wrong), path


def test_the_page_says_from_which_version_on() -> None:
    assert f"Kubernetes {OLDEST} or newer" in (ROOT / "docs" / "deploy.md").read_text("utf-8")


def test_a_misspelt_probe_and_a_wrong_type_are_refused() -> None:
    wrong = copy.deepcopy(ALL["Deployment", "spq-serve"])
    container = wrong["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    assert refused(wrong)
    wrong = copy.deepcopy(ALL["Deployment", "spq-serve"])
    wrong["spec"]["replicas"] = "one"
    assert refused(wrong)


def test_the_kustomization_lists_what_is_there() -> None:
    assert set(KUSTOMIZATION) == {"apiVersion", "kind", "namespace", "resources", "images"}
    assert sorted({*KUSTOMIZATION["resources"], *OPTIONAL}) == FILES
    assert not OPTIONAL & set(KUSTOMIZATION["resources"])
    (image,) = KUSTOMIZATION["images"]
    assert set(image) == {"name", "newName", "newTag"} and image["name"] == SERVER["image"].partition(":")[0]


def test_variables_are_options_and_secrets_come_from_the_secret() -> None:
    known = {option.variable for group in OPTIONS.values() for option in group}
    variables = {entry["name"]: entry for entry in SERVER["env"]}
    assert set(variables) - {"HF_TOKEN"} <= known
    secret = {name: e["valueFrom"]["secretKeyRef"] for name, e in variables.items() if "valueFrom" in e}
    assert set(secret) == {"SPQ_API_KEY", "SPQ_ADMIN_KEY", "HF_TOKEN"}
    assert not secret["SPQ_API_KEY"].get("optional"), "no server without a key"
    assert {entry["name"] for entry in secret.values()} == {"spq-serve"}


def test_the_server_takes_the_variables_of_the_pod() -> None:
    image = {name: value for name, value in stage("runtime").environment().items() if name.startswith("SPQ_")}
    pod = {entry["name"]: entry.get("value", "secret") for entry in SERVER["env"]}
    config = read_config([], image | pod)
    assert (config.model, config.access_log, config.host) == ("/models/source", "json", "0.0.0.0")
    assert (config.api_keys, config.admin_key) == (("secret",), "secret")


def test_no_service_can_set_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes sets SPQ_PORT for a Service of the name spq, unless told not to."""
    with pytest.raises(SystemExit):
        read_config([], {"SPQ_MODEL": "m", "SPQ_PORT": "tcp://10.0.0.1:8000"})
    assert "SPQ_PORT" in capsys.readouterr().err
    assert POD["enableServiceLinks"] is False


def test_the_port_is_the_images_everywhere() -> None:
    port = int(stage("runtime").environment()["SPQ_PORT"])
    assert SERVER["ports"] == [{"name": "http", "containerPort": port}]
    (of_service,) = ALL["Service", "spq-serve"]["spec"]["ports"]
    assert of_service["targetPort"] == "http"
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port) and annotations["prometheus.io/path"] in OPEN_PATHS


def test_probes_ask_what_is_there_without_a_key() -> None:
    probes = {name: SERVER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert set(paths.values()) <= {getattr(route, "path", "") for route in admin.router.routes} & OPEN_PATHS
    assert all(probe["httpGet"]["port"] == "http" for probe in probes.values())
    first_start_s = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
    assert first_start_s >= 3600, "it compresses"
    assert DEPLOYMENT["progressDeadlineSeconds"] > first_start_s


def test_a_drain_ends_before_the_pod_is_killed() -> None:
    waits_s = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits_s >= 1, "it serves on until the Service has forgotten it"
    drain_s = ServerConfig.model_fields["drain_timeout_s"].default
    assert POD["terminationGracePeriodSeconds"] >= waits_s + drain_s + CONNECTIONS_END_S + 10


@pytest.mark.parametrize("name", PODS)
def test_pods_are_as_restricted_as_kubernetes_asks(name: str) -> None:
    """Pod Security Standards, level restricted, and beyond it the image's user and a read-only root."""
    pod = PODS[name]
    user, _, group = stage("runtime").all("USER")[-1].partition(":")
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (int(user), int(group), int(group))
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    assert all({"persistentVolumeClaim", "emptyDir"} & volume.keys() for volume in pod["volumes"])


def test_only_the_cache_and_tmp_are_written() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    writable = {m["mountPath"] for m in SERVER["volumeMounts"] if not m.get("readOnly")}
    (cache,) = stage("runtime").command("VOLUME")
    assert writable == {cache, "/tmp"}
    assert {m["name"] for m in SERVER["volumeMounts"]} == set(volumes)
    claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert claims == {name for kind, name in ALL if kind == "PersistentVolumeClaim"}
    (models,) = [m["mountPath"] for m in SERVER["volumeMounts"] if m.get("readOnly")]
    variables = {entry["name"]: entry.get("value") for entry in SERVER["env"]}
    assert variables["SPQ_MODEL"].startswith(f"{models}/")


def test_one_card_one_server_at_a_time() -> None:
    assert SERVER["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert DEPLOYMENT["replicas"] == 1 and DEPLOYMENT["strategy"] == {"type": "Recreate"}
    budget = ALL["PodDisruptionBudget", "spq-serve"]["spec"]
    assert budget["maxUnavailable"] == 1 and "minAvailable" not in budget, "its node could never be emptied"


def test_all_mean_the_same_pods() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"].items()
    budget = ALL["PodDisruptionBudget", "spq-serve"]["spec"]
    for selector in (DEPLOYMENT["selector"]["matchLabels"], ALL["Service", "spq-serve"]["spec"]["selector"],
                     budget["selector"]["matchLabels"]):  # fmt: skip
        assert selector and selector.items() <= labels
    target = ALL["HorizontalPodAutoscaler", "spq-serve"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in ALL


def test_the_scaling_metric_is_one_of_ours_by_the_rule_in_the_docs() -> None:
    (metric,) = ALL["HorizontalPodAutoscaler", "spq-serve"]["spec"]["metrics"]
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    (rule,) = re.findall(r"```yaml\n(rules:.*?)```", page, re.S)
    (rule,) = yaml.safe_load(rule)["rules"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    series = re.match(r"[\w:]+", rule["seriesQuery"])
    assert series is not None and f'"{series[0]}"' in (ROOT / "server" / "metrics.py").read_text("utf-8")


def test_the_filler_is_the_base_of_the_image() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    assert PODS["filler"]["containers"][0]["image"] == base
