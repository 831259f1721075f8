"""What an installation contains, and that the pins say the same thing everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from tests.sources import FOLDERS, MODULES, ROOT, imports

PACKAGES = ("kernels", "server", "spq")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PINNED_BY_TORCH = re.compile(r"(nvidia-.*|cuda-.*|triton)$")
PIN = re.compile(r"([a-z0-9-]+)(?:\[[a-z,]+\])?==([0-9][0-9a-z.]*)(; sys_platform != 'win32')?$")


def read_pins(name: str) -> dict[str, str]:
    """Package -> version of one requirements file; fails on any line that is not a plain pin."""
    pins: dict[str, str] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if not line or line.startswith(("#", "-r ")):
            continue
        match = PIN.match(line)
        assert match, f"{name}: {line!r} is not name==version"
        assert match[1] not in pins, f"{name}: {match[1]} is pinned twice"
        pins[match[1]] = match[2]
    return pins


def declared(lines: list[str]) -> dict[str, str]:
    """Package -> version of requirements in pyproject.toml, each of which must be an exact pin."""
    pins: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is no exact pin"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


RUNTIME, DEV = read_pins("requirements.txt"), read_pins("requirements-dev.txt")
EXTRAS = read_pins("requirements-eval.txt")
LOADTEST = read_pins("requirements-loadtest.txt")
DIRECT = declared(PROJECT["project"]["dependencies"])
DIRECT_DEV = declared(PROJECT["project"]["optional-dependencies"]["dev"])
RECOVERY = declared(PROJECT["project"]["optional-dependencies"]["recovery"])
OTEL = declared(PROJECT["project"]["optional-dependencies"]["otel"])
RAY = read_pins("requirements-ray.txt")
DIRECT_RAY = declared(PROJECT["project"]["optional-dependencies"]["ray"])
DIRECT_LOADTEST = declared(PROJECT["project"]["optional-dependencies"]["loadtest"])


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter in the root of the clone, which so comes first on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_is_not_disturbed_by_our_package_named_kernels() -> None:
    # transformers looks for a distribution and a module of the name `kernels`, which is Hugging Face's
    code = """
import json, sys
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
import torch
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
logits = LlamaForCausalLM(config)(input_ids=torch.tensor([[1, 2]])).logits
import kernels
print(json.dumps([is_kernels_available(), list(logits.shape), kernels.__file__]))
"""
    available, shape, file = json.loads(run_python(code).splitlines()[-1])
    assert available is False
    assert shape == [1, 2, 8]
    assert Path(file) == ROOT / "kernels" / "__init__.py"


def test_importing_kernels_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import kernels; print(sorted(set(sys.modules) - before))"
    assert run_python(code).strip() == "['kernels']"


def test_version_cannot_be_taken_for_that_of_the_other_kernels() -> None:
    # transformers accepts the package from 0.9 on; ours and the distribution's stay below
    major, minor, *_ = map(int, PROJECT["project"]["version"].split("."))
    assert (major, minor) < (0, 9)
    assert run_python("import kernels; print(kernels.__version__)").strip() == "0.0.0"


def test_a_wheel_has_the_three_packages_and_no_more() -> None:
    found = find_packages(str(ROOT), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    assert {name.partition(".")[0] for name in found} == set(PACKAGES)
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders} == set(found), (
        "a folder with modules but without __init__.py would be missing from the wheel"
    )


def test_packages_hold_only_what_a_wheel_carries() -> None:
    # setuptools takes other files only when package-data names them, or as sources of extensions
    data = {
        str(path.relative_to(ROOT))
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    sources = {f for e in PROJECT["tool"]["setuptools"]["ext-modules"] for f in e["sources"] + e["depends"]}
    assert all((ROOT / source).is_file() for source in sources)
    others = [
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".so"} and "__pycache__" not in path.parts
    ]
    assert set(others) == sources | data


def test_both_commands_exist() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert sorted(scripts) == ["spq-compress", "spq-eval", "spq-plan", "spq-search", "spq-serve"]
    targets = [target.split(":") for target in scripts.values()]
    code = f"from importlib import import_module as get; print([callable(getattr(get(m), f)) for m, f in {targets}])"
    assert run_python(code).strip() == str([True] * len(targets))


def test_installed_metadata_is_that_of_the_clone() -> None:
    try:
        installed = version("spq-serve")
    except PackageNotFoundError:
        pytest.skip("spq-serve is not installed here, the tests run from the clone alone")
    assert installed == PROJECT["project"]["version"]
    top_level = {name for name, owners in packages_distributions().items() if "spq-serve" in owners}
    assert {name for name in top_level if not name.startswith("__editable__")} == set(PACKAGES)


def test_pins_agree_with_pyproject() -> None:
    assert {name: RUNTIME.get(name) for name in DIRECT} == DIRECT
    both = RUNTIME | DEV
    assert {name: both.get(name) for name in DIRECT_DEV} == DIRECT_DEV
    assert {name: DIRECT_DEV.get(name) for name in RECOVERY | OTEL} == RECOVERY | OTEL
    assert not set(RUNTIME) & set(DEV), "pinned in both files"


def test_pins_of_the_extras_agree_and_change_nothing_else() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    direct = declared(extras["eval"]) | declared(extras["plots"])
    assert {name: EXTRAS.get(name) for name in direct} == direct
    assert not set(EXTRAS) & set(RUNTIME), "an extra pins a package of the runtime again"
    assert [name for name in EXTRAS if name.startswith("torch") or PINNED_BY_TORCH.match(name)] == []
    assert {name: pin for name, pin in EXTRAS.items() if DEV.get(name, pin) != pin} == {}


def test_pins_of_the_load_test_agree_with_all_others() -> None:
    """It stands alone, and make test installs it beside the rest."""
    assert {name: LOADTEST.get(name) for name in DIRECT_LOADTEST} == DIRECT_LOADTEST
    others = RUNTIME | DEV | EXTRAS
    assert {name: pin for name, pin in LOADTEST.items() if others.get(name, pin) != pin} == {}
    assert [name for name in LOADTEST if name.startswith("torch") or PINNED_BY_TORCH.match(name)] == []


def test_pins_of_ray_agree_with_all_others() -> None:
    """It stands beside the runtime, and never in its place."""
    assert {name: RAY.get(name) for name in DIRECT_RAY} == DIRECT_RAY
    assert not set(RAY) & set(RUNTIME)
    others = DEV | EXTRAS | LOADTEST
    assert {name: pin for name, pin in RAY.items() if others.get(name, pin) != pin} == {}
    assert [name for name in RAY if name.startswith("torch") or PINNED_BY_TORCH.match(name)] == []


def check_needs(name: str, pins: dict[str, str], allowed: dict[str, str], extra: str, remedy: str) -> None:
    """What a package of `pins` requires, in `extra` too, is in `allowed` at a version that it takes."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here: {remedy} installs it")
    if installed != pins[name]:
        pytest.skip(f"{name} {installed} is installed here, {pins[name]} is pinned")
    for need in map(Requirement, requires(name) or ()):
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            pin = allowed.get(canonicalize_name(need.name))
            assert pin and need.specifier.contains(pin, prereleases=True), f"{name} needs {need}, pinned is {pin}"


@pytest.mark.parametrize("name", sorted(RAY))
def test_what_ray_needs_is_pinned(name: str) -> None:
    check_needs(name, RAY, RUNTIME | RAY, "serve" if name == "ray" else "", "make test-scale")


@pytest.mark.parametrize("name", sorted(LOADTEST))
def test_what_the_load_test_needs_is_pinned(name: str) -> None:
    extra = "client" if name == "python-socketio" else ""  # which locust asks for
    check_needs(name, LOADTEST, LOADTEST, extra, "make test")


def test_the_clients_have_all_they_need_and_nothing_else() -> None:
    """In an environment of its own, as LiteLLM wants other versions than this project."""
    clients = read_pins("requirements-clients.txt")
    python = Path(sys.prefix) / "clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("the clients' environment is missing: make test makes it")
    code = """
import json
from importlib.metadata import distributions
print(json.dumps([[d.name, d.version, d.requires or []] for d in distributions()]))
"""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found = {canonicalize_name(name): (version, needs) for name, version, needs in json.loads(done.stdout)}
    found = {name: facts for name, facts in found.items() if name not in ("pip", "setuptools")}
    assert {name: version for name, (version, _) in found.items()} == clients
    for name, (_, needs) in found.items():
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                pin = clients.get(canonicalize_name(need.name))
                assert pin and need.specifier.contains(pin, prereleases=True), f"{name} needs {need}, pinned is {pin}"


def test_runtime_pins_leave_torch_its_own_choice_of_build() -> None:
    assert "+" not in RUNTIME["torch"]
    assert [name for name in RUNTIME if PINNED_BY_TORCH.match(name)] == []


@pytest.mark.parametrize("name", sorted(RUNTIME | DEV))
def test_what_a_pinned_package_needs_is_pinned(name: str) -> None:
    pins = RUNTIME if name in RUNTIME else RUNTIME | DEV
    wanted = (RUNTIME | DEV)[name]
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    if installed.partition("+")[0] != wanted:
        pytest.skip(f"{name} {installed} is installed here, {wanted} is pinned")
    for need in map(Requirement, requires(name) or ()):
        other = canonicalize_name(need.name)
        if (need.marker and not need.marker.evaluate({"extra": ""})) or PINNED_BY_TORCH.match(other):
            continue
        assert other in pins, f"{name} needs {other}, which is not pinned"
        assert need.specifier.contains(pins[other], prereleases=True), f"{name} needs {need}, {pins[other]} is pinned"


def test_every_import_is_declared() -> None:
    provided = {
        "pydantic_core": "pydantic",  # which pins its core exactly
        "prometheus_client": "prometheus-client",
        "yaml": "pyyaml",
        "opentelemetry": "opentelemetry-sdk",  # which brings the API and pins it exactly
    }
    optional = {"triton"}  # comes with torch's CUDA build; the code says so where it is missing
    extras = {"spq.tasks": {"lm-eval", "datasets"},  # lm-eval brings datasets
              "spq.pareto_plot": {"matplotlib"}, "benchmarks.panel_plot": {"matplotlib"}}  # fmt: skip
    missing = []
    for module in MODULES:
        names = DIRECT if module.path.startswith(PACKAGES) else DIRECT | DIRECT_DEV
        if module.path == "spq/recover.py":
            names = DIRECT | RECOVERY
        if module.name in ("server.traces", "server.spans"):
            names = DIRECT | OTEL
        if module.name.startswith("spq_vllm"):
            names = DIRECT | {"vllm": "in whose environment it runs"}
        if module.name in ("server.ray_app", "server.ray_metrics", "benchmarks.scaling"):
            names = names | DIRECT_RAY
        if module.path.startswith("loadtest/"):
            names = DIRECT_LOADTEST
        if module.name.endswith(".bench"):  # a program for developers
            names = DIRECT | DIRECT_DEV
        for _, target in imports(module):
            top = target.partition(".")[0]
            local = top in FOLDERS or (ROOT / top).is_dir() or top in sys.stdlib_module_names
            package = provided.get(top, canonicalize_name(top))
            if not local and top not in optional and package not in {*names, *extras.get(module.name, ())}:
                missing.append(f"{module.path}: {top}")
    assert missing == []


def test_every_declared_package_is_used() -> None:
    used = {canonicalize_name(target.partition(".")[0]) for module in MODULES for _, target in imports(module)}
    template_engine = {"jinja2"}  # transformers renders chat templates with it, but does not require it
    web_server = {"uvloop", "httptools"}  # uvicorn takes them where it finds them
    assert set(DIRECT) - used - template_engine - web_server == set()
