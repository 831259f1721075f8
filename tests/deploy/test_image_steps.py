"""The steps of the image, word by word from the Dockerfile, in a clean folder without an engine.

Not the download of packages: those of this environment stand in for /opt/venv's (`-m program` does download them). What
is installed is what .dockerignore and COPY let through, and what runs is ENTRYPOINT with ENV and HEALTHCHECK.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.recipe import ROOT, stage

BODY = {"model": "storyteller", "messages": [{"role": "user", "content": "The sea"}], "temperature": 0}


def shell(command: str, folder: Path) -> None:
    done = subprocess.run(["sh", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def copy(stage_name: str, folder: Path, moved: dict[str, Path]) -> None:
    """COPY of one stage from the repository, without what .dockerignore keeps back."""
    for text in stage(stage_name).all("COPY"):
        if "--from" in text:
            continue
        *sources, target = text.split()
        for source in sources:
            place = in_folder(target, moved) if target.startswith("/") else str(folder / target)
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(ROOT / source, place, ignore=ignore, dirs_exist_ok=True)
            else:
                Path(place).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)


def in_folder(text: str, moved: dict[str, Path]) -> str:
    """The image's paths as those of this test."""
    for path, place in moved.items():
        text = text.replace(path, str(place))
    return text


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the image's folders lie: /opt/venv with the project installed, /opt/spq, /cache."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which the build stage installs")
    root = tmp_path_factory.mktemp("image")
    moved = {"/opt/venv": root / "venv", "/opt/spq": root / "spq", "/app": root / "app", "/cache": root / "cache"}
    (root / "cache").mkdir()
    (root / "build").mkdir()
    shell(f"{sys.executable} -m venv --without-pip {root / 'venv'}", root)
    packages = sysconfig.get_paths(vars={"base": str(root / "venv"), "platbase": str(root / "venv")})["purelib"]
    (Path(packages) / "packages.pth").write_text(sysconfig.get_paths()["purelib"])  # stands for the lock's packages
    copy("app", root / "build", moved)
    (install,) = stage("app").all("RUN")
    shell(in_folder(install, moved).replace("python -m pip", f"{sys.executable} -m pip", 1), root / "build")
    shutil.copytree(f"{root / 'app'}{root / 'venv'}", root / "venv", dirs_exist_ok=True)
    copy("runtime", root / "build", moved)
    return moved


@pytest.fixture(scope="module")
def server(image: dict[str, Path]) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """ENTRYPOINT with ENV, in /cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: in_folder(text, image) for name, text in stage("runtime").environment().items()}
    environment["PATH"] = environment["PATH"].replace("$PATH", os.environ["PATH"])
    environment |= {"SPQ_PORT": port, "SPQ_HOST": "127.0.0.1", "SPQ_PRESET": "int8", "OMP_NUM_THREADS": "1"}
    command = shutil.which(stage("runtime").command("ENTRYPOINT")[0], path=environment["PATH"])
    assert command == str(image["/opt/venv"] / "bin" / "spq-serve")
    process = subprocess.Popen([command], env=environment, cwd=image["/cache"])
    yield process, environment
    process.kill()
    process.wait()


def check_health(image: dict[str, Path], environment: dict[str, str]) -> int:
    command = [in_folder(word, image) for word in stage("runtime").command("HEALTHCHECK")]
    found = shutil.which(command[0], path=environment["PATH"])
    done = subprocess.run([str(found), *command[1:]], env=environment, capture_output=True, timeout=30, check=False)
    return done.returncode


def test_the_container_turns_healthy_answers_and_drains(
    image: dict[str, Path], server: tuple[subprocess.Popen[bytes], dict[str, str]]
) -> None:
    process, environment = server
    assert check_health(image, environment) == 1, "healthy before the model is loaded"
    deadline = time.monotonic() + 120
    while check_health(image, environment) != 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)

    connection = http.client.HTTPConnection("127.0.0.1", int(environment["SPQ_PORT"]), timeout=60)
    more = {"stream": True, "max_tokens": 400, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY | more), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    first = answer.readline()
    assert first.startswith(b"data: ")
    process.send_signal(signal.SIGTERM)
    assert answer.read().endswith(b"data: [DONE]\n\n"), "the drain cut the stream"
    assert process.wait(timeout=30) == 0


def test_what_runs_is_what_was_installed(image: dict[str, Path]) -> None:
    python = image["/opt/venv"] / "bin" / "python"
    code = "import kernels, server, spq; print(kernels.__file__, server.__file__, spq.__file__)"
    done = subprocess.run([python, "-c", code], cwd=image["/cache"], capture_output=True, text=True, check=True)
    assert all(path.startswith(str(image["/opt/venv"])) for path in done.stdout.split())


@pytest.mark.program
def test_the_lock_installs_into_a_clean_environment(tmp_path: Path) -> None:
    shell(f"{sys.executable} -m venv --without-pip {tmp_path / 'venv'}", tmp_path)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    (install,) = [run for run in stage("build").all("RUN") if "requirements.lock" in run]
    moved = {"/opt/venv": tmp_path / "venv"}
    shell(in_folder(install, moved).replace("python -m pip", f"{sys.executable} -m pip", 1), tmp_path)
