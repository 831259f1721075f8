"""Runs a program that talks to a server as another project's client: each of its checks is one test here.

The program gets the servers' base URLs as arguments and prints one JSON object: name of a check -> "" or what went
wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent


def names(program: str, pattern: str) -> list[str]:
    """Names of a program's checks, as its source has them; `pattern` has one group."""
    found = re.findall(pattern, (FOLDER / program).read_text("utf-8"), re.MULTILINE)
    assert found, f"{program} has no checks"
    return found


def run(*command: str | Path, timeout_s: float = 240) -> dict[str, str]:
    """Results by name; fails where the program itself does."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return results
