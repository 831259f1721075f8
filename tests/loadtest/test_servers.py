"""The catalogue of servers and its variants."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadtest.servers import catalogue, with_flags


def test_a_variant_is_its_base_with_flags_appended() -> None:
    servers = catalogue()
    variant = with_flags(servers, "llama.cpp-q8_0-b256=llama.cpp-q8_0 --batch-size 256")
    assert variant.command == (*servers["llama.cpp-q8_0"].command, "--batch-size", "256")
    assert variant.name == "llama.cpp-q8_0-b256"
    with pytest.raises(ValueError, match="BASE"):
        with_flags(servers, "x=unknown --flag")


def test_every_command_is_filled_from_the_options() -> None:
    options = subprocess.run(
        [sys.executable, "-m", "loadtest.compare", "--help"], capture_output=True, text=True, check=True
    ).stdout
    values = dict.fromkeys(
        ("model", "llama_server", "gguf", "transformers_python", "vllm_python", "gptq", "cache", "threads"), "X"
    )
    assert all(f"--{name.replace('_', '-')}" in options for name in values)
    for server in catalogue().values():
        filled = server.filled(values | {"python": "X", "cores": "0-1", "port": "1"})
        assert not any("{" in part for part in (*filled.command, *filled.env.values()))
