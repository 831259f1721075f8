"""deploy/gptq_checkpoints.sh with a stand-in for the python that has GPTQModel: what is made from what, and once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.deploy.recipe import ROOT

PYTHON = """#!/bin/sh
# -m benchmarks.gptq_checkpoint SOURCE OUT --bits BITS ...
echo "$*" >> "$CALLS"
mkdir "$4"
[ "$6" != "${BROKEN:-}" ] || exit 1
touch "$4/config.json"
"""


def make(tmp_path: Path, **more: str) -> tuple[int, list[str]]:
    """Status, and the calls of python."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {
        "CALLS": str(tmp_path / "calls"),
        "MODELS_DIR": str(tmp_path),
        "GPTQ_PYTHON": str(python),
        **more,
    }
    command = [ROOT / "deploy" / "gptq_checkpoints.sh", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def source(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").touch()


def test_both_are_made_of_the_same_weights_and_text_and_once(tmp_path: Path) -> None:
    source(tmp_path)
    status, calls = make(tmp_path)
    assert status == 0
    options = "--group 128 --device cpu --calibration demo/calibration.txt"
    assert calls == [
        f"-m benchmarks.gptq_checkpoint {tmp_path}/source {tmp_path}/gptq-{bits}bit.part --bits {bits} {options}"
        for bits in (8, 4)
    ]
    assert make(tmp_path) == (0, calls)


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    source(tmp_path)
    status, _ = make(tmp_path, BROKEN="4")
    assert status != 0
    assert (tmp_path / "gptq-8bit" / "config.json").exists()
    assert not (tmp_path / "gptq-4bit").exists()
    assert make(tmp_path)[0] == 0
    assert (tmp_path / "gptq-4bit" / "config.json").exists()


def test_without_a_source_nothing_is_made(tmp_path: Path) -> None:
    assert make(tmp_path) == (1, [])
