"""deploy/compare.sh with a stand-in for the engine: the servers take turns, and the card is free after each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.recipe import ROOT

ENGINE = """#!/bin/sh
# `docker compose` as far as the script uses it: $STATE/up is the server that runs
echo "$*" >> "$STATE/calls"
case $1 in
up)
    for last; do :; done
    [ ! -e "$STATE/up" ] || { echo "$last beside $(cat "$STATE/up")" >> "$STATE/shared"; }
    [ "$last" != "${BROKEN:-}" ] || exit 1
    echo "$last" > "$STATE/up" ;;
stop) rm -f "$STATE/up" ;;
run)
    [ -e "$STATE/up" ] || exit 9
    case "$*" in *"${UNEQUAL:-nothing}"*) exit 3 ;; esac ;;
esac
"""


def compare(tmp_path: Path, **more: str) -> tuple[int, list[str], Path]:
    """Status of the script, the engine's calls, the engine's state."""
    for folder in ("source", "gptq-8bit", "gptq-4bit"):
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / "config.json").touch()
    engine = tmp_path / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    environment = os.environ | {
        "STATE": str(tmp_path),
        "COMPOSE": str(engine),
        "MODELS_DIR": str(tmp_path / "models"),
        "REPORT_DIR": str(tmp_path / "report"),
        "COMPARE_ROUNDS": "2",
        **more,
    }
    script = ROOT / "deploy" / "compare.sh"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], tmp_path


def test_servers_take_turns_and_never_share_the_card(tmp_path: Path) -> None:
    status, calls, state = compare(tmp_path)
    assert status == 0
    assert [call.split()[-1] for call in calls if call.startswith("up ")] == ["spq-gpu", "gptq-8bit", "gptq-4bit"] * 2
    assert not (state / "shared").exists()
    assert not (state / "up").exists(), "a server was left on the card"
    loads = [call for call in calls if call.startswith("run ")]
    assert ["--bits" in load for load in loads] == [False, True, True] * 2
    assert all("--rounds 1" in load and "--add" in load and "--subject spq" in load for load in loads)
    assert "--server gptq-4bit=http://gptq:8000 --bits gptq-4bit=4" in loads[2]
    (report,) = (tmp_path / "report").iterdir()
    assert all(f"/report/{report.name} " in load for load in loads)


@pytest.mark.parametrize("wrong", [{"BROKEN": "gptq-8bit"}, {"UNEQUAL": "gptq-4bit"}])
def test_a_failure_ends_it_and_frees_the_card(tmp_path: Path, wrong: dict[str, str]) -> None:
    status, calls, state = compare(tmp_path, **wrong)
    assert status != 0
    assert not (state / "up").exists()
    assert calls[-1].startswith(("rm ", "stop "))


def test_missing_models_are_said_before_anything_starts(tmp_path: Path) -> None:
    status, calls, _ = compare(tmp_path, COMPARE_RIVALS="gptq-3bit")
    assert (status, calls) == (1, [])
