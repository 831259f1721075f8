"""LiteLLM as the parser of what a real server sends, with both of its providers that fit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import checks
import pytest
from live import serve

PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"  # made by `make test` from requirements-clients.txt
NAMES = checks.names("litellm_checks.py", r"def check_(\w+)\(")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not PYTHON.exists():
        pytest.skip("litellm's environment is missing: make test installs requirements-clients.txt into it")
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text('[right]\nkey = "right"\n[limited]\nkey = "limited"\nrequests_per_minute = 1\n')
    keys.chmod(0o600)
    with serve(api_key_file=keys) as live, serve(max_num_seqs=1, max_queue=0) as small:
        found = checks.run(PYTHON, checks.FOLDER / "litellm_checks.py", f"{live.url}/v1", f"{small.url}/v1")
        assert live.is_idle() and small.is_idle()
    return found


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("name", NAMES)
def test_litellm(results: dict[str, str], name: str, provider: str) -> None:
    error = results[f"{name}-{provider}"]
    assert not error, f"{os.linesep}{error}"
