"""The openai package for Node as the parser of what a real server sends."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import checks
import pytest
from live import serve

MODULES = Path(sys.prefix) / "node" / "node_modules"  # made by `make test`: npm ci from node/package-lock.json
NAMES = checks.names("node/checks.mjs", r"^  async (\w+)\(")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    node = shutil.which("node")
    if node is None or not MODULES.is_dir():
        pytest.skip("node or its package openai is missing: make test installs the package where there is npm")
    folder = tmp_path_factory.mktemp("node")
    script = Path(shutil.copy(checks.FOLDER / "node" / "checks.mjs", folder))
    (folder / "node_modules").symlink_to(MODULES)  # modules are looked for beside the program
    with serve() as live, serve(api_keys=("right",), max_num_seqs=1, max_queue=0) as other:
        found = checks.run(node, script, f"{live.url}/v1", f"{other.url}/v1")
        assert live.is_idle() and other.is_idle()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_node(results: dict[str, str], name: str) -> None:
    assert not results[name], f"{os.linesep}{results[name]}"
